"""What a new run begins with in place of random weights: `train.start_from`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unite_fast.config import Config
from unite_fast.engine.agreement import require_same_start
from unite_fast.engine.checkpoint import FREE, changes
from unite_fast.engine.world import World
from unite_fast.errors import UserError
from unite_fast.importing import Trained, open_trained
from unite_fast.model.two_pass import TwoPassModel

LABELS = ("encoder.label.weight", "denoiser.label.weight")  # tables of one row a class and two of no class


def starting_weights(config: Config, world: World) -> Trained | None:
    """The EMA weights that `train.start_from` names, of the run's sizes but for the classes; None without. Collective.

    Needs neither the data nor the network, so that what is wrong is said before minutes of measuring.

    Raises:
        UserError: nothing to load there, a model of other sizes, ranks that find different weights.
    """
    if config.train.start_from is None:
        return None
    try:
        trained = open_trained(config.train.start_from)
    except UserError as error:
        raise UserError(f"train.start_from: {error}") from None
    _check_sizes(trained, config)
    require_same_start(trained, world)
    return trained


@torch.no_grad()
def begin_from(trained: Trained, model: TwoPassModel, classes: Sequence[str]) -> str:
    """Give a new network the weights of `starting_weights`.

    A class keeps its embedding where one of its name is there, or, where names are not on record, where there are as
    many classes; those of other classes stay as they were initialised.

    Args:
        trained: the weights.
        model: as it was initialised; changed in place.
        classes: its class names by label.

    Returns:
        A sentence that says what was taken.
    """
    own, count = model.state_dict(), model.config.num_classes
    rows = _rows(trained, count, classes)
    for name, tensor in trained.state.items():
        if name not in LABELS:
            own[name].copy_(tensor)
            continue
        own[name][-2:] = tensor[-2:]
        for row, before in rows.items():
            own[name][row] = tensor[before]
    step, new = trained.made_by.get("step"), count - len(rows)
    return (
        f"the run begins with the weights of {trained.origin}"
        + (f", step {step}" if isinstance(step, int) else "")
        + (f"; {new} of {count} classes {'is' if new == 1 else 'are'} new, with random embeddings" if new else "")
    )


def _check_sizes(trained: Trained, config: Config) -> None:
    if trained.config.modality != config.modality:
        raise UserError(
            f"train.start_from: {trained.origin} is a model of {trained.config.modality}, and this run is of "
            f"{config.modality}: give one of those"
        )
    here, there = (sizes.model_dump(mode="json") for sizes in (config.model, trained.config))
    problems = [
        f"{key} is {mine!r}, there {its!r}"
        for key, mine, its in changes(here, there, "model")
        if key not in FREE - {"model.image_size"} | {"model.num_classes"}
    ]
    if problems:
        raise UserError(
            f"train.start_from: the model of {trained.origin} differs: {'; '.join(problems[:3])}. Set model as it "
            f"is there; model.num_classes alone may differ"
        )


def _rows(trained: Trained, count: int, classes: Sequence[str]) -> dict[int, int]:
    """Label here -> label there, of the classes that are in both."""
    if trained.class_names is None:
        return {label: label for label in range(count)} if trained.config.num_classes == count else {}
    there = {name: label for label, name in enumerate(trained.class_names)}
    return {label: there[name] for label, name in enumerate(classes) if name in there}
