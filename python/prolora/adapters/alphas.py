"""The alphas of a LoRA's file: what its updates have, and what its trainer's header has."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from ..errors import UnsupportedFormat
from ..files.jsontext import parse_json_object
from .key_groups import Slot
from .lora import Lora

SMALLEST_ALPHA, LARGEST_ALPHA = 1e-6, 1e6
"""Alphas beyond these are damage: no trainer takes them."""


def read_alpha(text: str) -> float:
    """Reads an alpha of a trainer's header; 0 if it is unusable."""
    try:
        alpha = float(text.strip('" ')) if len(text) < 100 else 0.0
    except ValueError:
        return 0.0
    return alpha if SMALLEST_ALPHA <= alpha <= LARGEST_ALPHA else 0.0


@dataclass(frozen=True)
class Alphas:
    """The alphas in front of low-rank updates."""

    slots: list[Slot]  # with a rank, and no configuration of PEFT
    stored: dict[str, float]  # module -> alpha, of those that have one
    trained: float  # of linear layers, 0 where unknown
    trained_convolutions: float  # of convolutions with a window

    @classmethod
    def of(cls, slots: Iterable[Slot], opened: Lora) -> Alphas:
        """Reads the alphas in front of low-rank updates."""
        ranked = [slot for slot in slots if slot.form.rank and slot.peft is None]
        stored = {
            slot.module.name: opened.read_number(slot.keys["alpha"])
            for slot in ranked
            if "alpha" in slot.keys and "scale" not in slot.keys
        }
        trained, arguments = read_alpha(opened.metadata.get("ss_network_alpha", "")), {}
        with suppress(UnsupportedFormat):
            text = opened.metadata.get("ss_network_args", "")
            arguments = parse_json_object(text, "ss_network_args")
        of_convolutions = read_alpha(str(arguments.get("conv_alpha", "")))
        return cls(ranked, stored, trained, of_convolutions or trained)

    def find_trained(self, slot: Slot) -> float:
        """Returns an update's alpha by the header; 0 if unknown."""
        window = math.prod(slot.kernel or (1,)) > 1
        return self.trained_convolutions if window else self.trained
