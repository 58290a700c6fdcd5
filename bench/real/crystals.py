"""CHGNet's three published networks of crystals, and the structures that they are asked about."""

from __future__ import annotations

import functools
import random
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CHGNET: dict[str, dict[str, bool]] = {"0.3.0": {}, "r2scan": {}, "0.2.0": {"mlp_out_bias": True}}
"""Version -> what its file does not say of its shape."""
CUBIC = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
FACES = ((0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0))
PROTOTYPES = {  # name -> (edge in Å, axes in edges, elements, places in axes)
    "rock salt": (4.3, FACES, "AX", [(0, 0, 0), (0.5, 0.5, 0.5)]),
    "fluorite": (5.4, FACES, "AXX", [(0, 0, 0), (0.25, 0.25, 0.25), (0.75, 0.75, 0.75)]),
    "caesium chloride": (3.4, CUBIC, "AX", [(0, 0, 0), (0.5, 0.5, 0.5)]),
    "perovskite": (
        4.0,
        CUBIC,
        "ABXXX",
        [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)],
    ),
}
ELEMENTS = {
    "A": "Li Na K Mg Ca Sr Ba Mn Fe Co Ni Zn La Y".split(),
    "B": "Ti V Cr Mn Fe Co Ni Zr Nb Mo Al Ga".split(),
    "X": "O O O S F Cl N".split(),
}
SWAPPED = {"O": "S", "F": "Cl", "Na": "K", "Ca": "Sr", "Fe": "Mn", "Co": "Ni"}
"""Element -> what *swapped* reads it as."""
EXPANDED = 1.04
"""By how much *expanded* reads every edge as longer."""
STRUCTURES = 480


class Network:
    """A published network, which gives every atom an energy and a magnetic moment."""

    ideas = ("expanded", "swapped")
    adapted = r"(.*\.mlp_(core|gate|out)|mlp)\.layers\.\d+"

    def __init__(self, data: Path, name: str) -> None:
        # The packages alone, not what asks cards for their memory.
        sys.modules.setdefault("nvidia_smi", types.ModuleType("nvidia_smi"))
        from chgnet.model.model import CHGNet

        (file,) = (data / "chgnet/pretrained" / name).glob("*.tar")
        stored = torch.load(file, weights_only=True, map_location="cpu")
        facts = stored["model"]["model_args"] | CHGNET[name]
        weights = stored["model"]["state_dict"]
        self.model: nn.Module = CHGNet.from_dict({"model_args": facts, "state_dict": weights})
        self.model.composition_model = None  # a sum over elements, which no LoRA reaches
        self.model.eval().requires_grad_(False)

    def answer(self, model: nn.Module, crystals: list[Any]) -> Tensor:
        """Structures -> energies and moments of all atoms [2, atoms]."""
        graphs = [self.model.graph_converter(one) for one in crystals]
        answer = model(graphs, task="em", return_site_energies=True)
        return torch.stack([torch.cat([*answer["site_energies"]]), torch.cat([*answer["m"]])])

    def ask(
        self, idea: str, crystals: list[Any], _: torch.Generator
    ) -> tuple[list[Any], list[Any]]:
        """(what the LoRA reads, what it is to be read as)."""
        meant = [one.copy() for one in crystals]
        for one in meant:
            if idea == "expanded":
                one.scale_lattice(one.volume * EXPANDED**3)
            else:
                one.replace_species({a: b for a, b in SWAPPED.items() if a in one.symbol_set})
        return crystals, meant


@functools.cache
def open_network(data: Path, name: str) -> Network:
    return Network(data, name)


@functools.cache
def write_structures() -> list[Any]:
    """Usual prototypes with random elements, edges and displacements."""
    from pymatgen.core import Structure

    chosen, structures = random.Random(1), []
    for _ in range(STRUCTURES):
        edge, axes, letters, places = PROTOTYPES[chosen.choice([*PROTOTYPES])]
        of = {letter: chosen.choice(names) for letter, names in ELEMENTS.items()}
        edge *= chosen.uniform(0.95, 1.1) * (1.2 if of["X"] in ("S", "Cl") else 1)
        shifted = [[x + chosen.gauss(0, 0.02) for x in place] for place in places]
        lattice = [[edge * x for x in axis] for axis in axes]
        structures.append(Structure(lattice, [of[letter] for letter in letters], shifted))
    return structures
