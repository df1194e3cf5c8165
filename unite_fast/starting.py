"""What a new run begins with in place of random weights: `train.start_from`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unite_fast.config import Config
from unite_fast.engine.checkpoint import FREE, changes
from unite_fast.errors import UserError
from unite_fast.importing import Trained, open_trained
from unite_fast.model.two_pass import TwoPassModel

LABELS = ("encoder.label.weight", "denoiser.label.weight")  # tables of one row a class and two of no class


@torch.no_grad()
def begin_from(model: TwoPassModel, config: Config, classes: Sequence[str]) -> str:
    """Give a new network the EMA weights that `train.start_from` names, of the same sizes but for the classes.

    A class keeps its embedding where one of its name is there, or, where names are not on record, where there are as
    many classes; those of other classes stay as they were initialised.

    Args:
        model: as it was initialised; changed in place.
        config: of the new run.
        classes: its class names by label.

    Returns:
        A sentence that says what was taken.

    Raises:
        UserError: nothing to load there, or a model of other sizes.
    """
    trained = open_trained(config.train.start_from)
    own = model.state_dict()
    _check_sizes(trained, config, own)
    rows = _rows(trained, config, classes)
    for name, tensor in trained.state.items():
        if name not in LABELS:
            own[name].copy_(tensor)
            continue
        own[name][-2:] = tensor[-2:]
        for row, before in rows.items():
            own[name][row] = tensor[before]
    step, count = trained.made_by.get("step"), config.model.num_classes
    return (
        f"the run begins with the weights of {trained.origin}"
        + (f", step {step}" if isinstance(step, int) else "")
        + (f"; of {count} classes {count - len(rows)} are new and begin at random" if len(rows) < count else "")
    )


def _check_sizes(trained: Trained, config: Config, own: Mapping[str, Tensor]) -> None:
    here, there = (sizes.model_dump(mode="json") for sizes in (config.model, trained.config))
    if config.model.modality != trained.config.modality:
        problems = [f"it is one of {trained.config.modality}"]
    else:
        problems = [
            f"{key} is {mine!r}, there {its!r}"
            for key, mine, its in changes(here, there, "model")
            if key not in FREE | {"model.num_classes"}
        ]
        shapes = [{name: list(x.shape) for name, x in state.items()} for state in (own, trained.state)]
        problems = problems or [
            f"{name} is {shapes[0].get(name, 'missing')}, there {shapes[1].get(name, 'missing')}"
            for name in dict.fromkeys((*own, *trained.state))
            if name not in LABELS and shapes[0].get(name) != shapes[1].get(name)
        ]
    if problems:
        raise UserError(
            f"train.start_from: the model of {trained.origin} is another: {'; '.join(problems[:3])}. Take its sizes; "
            f"model.num_classes alone may differ"
        )


def _rows(trained: Trained, config: Config, classes: Sequence[str]) -> dict[int, int]:
    """Label here -> label there, of the classes that are in both."""
    if trained.class_names is None:
        same = trained.config.num_classes == config.model.num_classes
        return {label: label for label in range(config.model.num_classes)} if same else {}
    there = {name: label for label, name in enumerate(trained.class_names)}
    return {label: there[name] for label, name in enumerate(classes) if name in there}
