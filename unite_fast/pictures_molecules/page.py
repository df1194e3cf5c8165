"""One HTML file of molecules in three dimensions: no network, no other file, on a desk or a phone."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unite_fast.data.molecules.molecule_set import SYMBOLS, MoleculeSet
from unite_fast.data.molecules.perception import Perceived
from unite_fast.evaluation.edm import bond_orders
from unite_fast.evaluation.molecules import Reconstruction, align
from unite_fast.weights import write_text

Mark = Literal["good", "odd", "bad", "plain"]


@dataclass(frozen=True)
class Card:
    """One view."""

    caption: str  # SMILES or name
    note: str  # a few words below it
    mark: Mark
    elements: NDArray[np.uint8]  # [n]
    positions: NDArray[np.float64]  # [n, 3] Å
    bonds: Sequence[tuple[int, int, int]]  # atom, atom, order
    ghost: NDArray[np.float64] | None = None  # [n, 3] Å, the same atoms elsewhere, drawn faintly
    ghost_bonds: Sequence[tuple[int, int, int]] = ()  # there


@dataclass(frozen=True)
class Section:
    """Cards under a heading."""

    title: str
    note: str
    cards: Sequence[Card]


def generated_section(
    molecules: MoleculeSet, perceived: Sequence[Perceived], *, title: str = "Generated molecules", note: str = ""
) -> Section:
    """Every molecule as a card, in order; bonds are the perceived ones, or EDM's where perception fails."""
    cards = []
    for index, found in enumerate(perceived):
        elements, positions = molecules.atoms(index)
        if not found.valid:
            caption, small, mark = molecules.names[index], f"no valid molecule: {found.reason}", "bad"
        elif not found.connected:
            caption, small, mark = found.smiles, f"{found.fragments} fragments", "odd"
        else:
            caption, small, mark = found.smiles, f"{len(elements)} atoms", "good"
        cards.append(Card(caption, small, mark, elements, positions.astype(float), _bonds(elements, positions, found)))
    return Section(title, note, cards)


def reconstruction_section(
    originals: MoleculeSet,
    original_perceived: Sequence[Perceived],
    reconstructions: MoleculeSet,
    verdict: Reconstruction,
    *,
    count: int = 24,
    title: str = "Reconstructions",
    note: str = "The original as a grey shadow behind its reconstruction.",
) -> Section:
    """The first `count` reconstructions as cards, laid over their originals."""
    cards = []
    for index in range(min(count, len(originals))):
        elements, positions = reconstructions.atoms(index)
        same = bool(verdict.match[index])
        cards.append(
            Card(
                original_perceived[index].smiles or originals.names[index],
                f"RMSD {verdict.rmsd[index]:.3f} Å, {'same InChI' if same else 'not the same molecule'}",
                "good" if same else "bad",
                elements,
                positions.astype(float),
                _bonds(elements, positions, verdict.perceived[index]),
                align(originals.atoms(index)[1], positions),
                _bonds(*originals.atoms(index), original_perceived[index]),
            )
        )
    return Section(title, note, cards)


def molecule_page(path: str | Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write the page.

    Args:
        path: the HTML file; missing folders are made.
        title: heading and title of the page.
        subtitle: one line below it, such as the source and the metrics.
        sections: in order.

    Raises:
        UserError: a path that cannot be written.
    """
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    data = [
        {"title": section.title, "note": section.note, "cards": [_card(card) for card in section.cards]}
        for section in sections
    ]
    # In a script "</" could end the element, and U+2028 the line, wherever they stand.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    for place, value in (("TITLE", html.escape(title)), ("SUBTITLE", html.escape(subtitle)), ("DATA", text)):
        template = template.replace(f"@@{place}@@", value)
    write_text(template, path)


def _card(card: Card) -> dict[str, Any]:
    positions = card.positions - card.positions.mean(0)
    axes = np.linalg.svd(positions, full_matrices=True)[
        2
    ]  # the longest axis lies across the view, the shortest along it
    axes[2] *= np.sign(np.linalg.det(axes))  # a turn and no mirror image
    record: dict[str, Any] = {
        "caption": card.caption,
        "note": card.note,
        "mark": card.mark,
        "elements": "".join(SYMBOLS[code - 1] for code in card.elements),
        "at": np.round(positions @ axes.T, 3).ravel().tolist(),
        "bonds": _flat(card.bonds),
    }
    if card.ghost is not None:
        record["ghost"] = np.round((card.ghost - card.positions.mean(0)) @ axes.T, 3).ravel().tolist()
        record["ghostBonds"] = _flat(card.ghost_bonds)
    return record


def _flat(bonds: Sequence[tuple[int, int, int]]) -> list[int]:
    return [int(number) for bond in bonds for number in bond]


def _bonds(
    elements: NDArray[np.uint8], positions: NDArray[np.float32], perceived: Perceived
) -> list[tuple[int, int, int]]:
    if perceived.valid:
        return list(perceived.bonds)
    orders = bond_orders(elements[None], positions[None])[0]
    return [(int(i), int(j), int(orders[i, j])) for i, j in np.argwhere(np.triu(orders))]
