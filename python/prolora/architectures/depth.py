"""Blocks of a model in depth order, as block weights name them.

The names come from sd-webui-lora-block-weight: BASE is all text encoders, IN00 to OUT11 are LDM's
blocks of a UNet, D00 and S00 are FLUX's double and single blocks. A block of any other transformer
is called by its stack and number: `transformer_blocks.12`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from .family import Family
from .layouts import load_layout
from .modules import TEXT_ENCODERS, find_block, find_component
from .shared_names import find_unet_names

UNET_STAGES = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
BASE, MIDDLE = "BASE", "M00"
_LDM = re.compile(r"(input_blocks|middle_block|output_blocks)(?:\.(\d+))?\.")
_FLUX_STACKS = {"transformer_blocks": "D", "single_transformer_blocks": "S"}
_FLUX_ENCODERS = {"text_encoder": "CLIP", "text_encoder_2": "T5"}
ONE_LAYER_UNETS = ("bk-sdm", "koala")
"""Students with one layer a block where Stable Diffusion, and the numbers of LDM, have two."""


@dataclass(frozen=True)
class DepthTable:
    """The modules of a model, and the blocks that they lie in."""

    modules: tuple[str, ...]  # canonical names, of a published model or of the user's
    family: Family | None = None  # None where it is not known
    complete: bool = True  # False for a LoRA, which need not name all modules of its model

    def find_place(self, module: str) -> str:
        """Returns the block of a module, "" for an unnamed module outside all blocks."""
        component = find_component(module)
        is_flux = self.family is not None and self.family.id == "flux"
        if component in TEXT_ENCODERS:
            return _FLUX_ENCODERS.get(component, BASE) if is_flux else BASE
        if component == "unet":
            return self._find_ldm_place(module)
        block = find_block(module)
        if block is None:
            name = self.list_names(module)[-1] if is_flux else ""
            return "IN" if "_in" in name else "OUT" if name.startswith("final_layer") else ""
        if is_flux and block.stack in _FLUX_STACKS:
            return f"{_FLUX_STACKS[block.stack]}{int(block.number):02}"
        return f"{block.stack}.{block.number}"

    def list_names(self, module: str) -> list[str]:
        """Returns a module's names: in diffusers, and in the authors' files or LDM."""
        fused = self._names.find_weight_holding(module) if self._names else None
        return list(dict.fromkeys((module, fused.name if fused else module)))

    @cached_property
    def places(self) -> tuple[str, ...]:
        """All blocks in depth order, text encoders first."""
        return self._list_places(self.modules)

    @cached_property
    def notations(self) -> tuple[tuple[str, ...], ...]:
        """The lists of blocks that may have one value each, the longest first.

        A UNet adds the list of its blocks with attention, which LoRAs without convolutions have; a
        pruned student adds the lists of its parent.
        """
        lists = self._own_notations if self.complete else []
        if self._is_unet and self._layers == 2:
            deep = any(name.startswith(("down_blocks.3", "up_blocks.3")) for name in self.modules)
            parent = load_layout("sd15" if deep else "sdxl")
            lists += DepthTable(tuple(parent.shapes))._own_notations
        return tuple(sorted(set(lists), key=lambda places: (-len(places), places)))

    @property
    def _own_notations(self) -> list[tuple[str, ...]]:
        """All blocks, and for a UNet those with attention."""
        attention = (name for name in self.modules if ".attentions." in name)
        return [self.places, self._list_places(attention)] if self._is_unet else [self.places]

    @cached_property
    def _is_unet(self) -> bool:
        return any(name.partition(".")[0] in UNET_STAGES for name in self.modules)

    @cached_property
    def _names(self) -> Family | None:
        return find_unet_names(self.modules, self._layers) if self._is_unet else self.family

    @property
    def _layers(self) -> int:
        return 1 if self.family is not None and self.family.id in ONE_LAYER_UNETS else 2

    def _list_places(self, modules: Iterable[str]) -> tuple[str, ...]:
        """Returns the blocks of some modules, with the names UNets and FLUX always have."""
        places = {place for module in modules if (place := self.find_place(module))}
        if self.family is not None and self.family.id == "flux":
            places |= {*_FLUX_ENCODERS.values(), "IN", "OUT"}
        elif self._is_unet:
            places.add(BASE)
        else:
            places.discard(BASE)  # the notation of other transformers names blocks alone
        return tuple(sorted(places, key=_order_place))

    def _find_ldm_place(self, module: str) -> str:
        """Returns IN, M or OUT with its number for a module of a UNet."""
        match = _LDM.match(f"{self.list_names(module)[-1]}.") if self._is_unet else None
        if match is None:
            return ""
        if match[1] == "middle_block":
            return MIDDLE
        return f"{'IN' if match[1] == 'input_blocks' else 'OUT'}{int(match[2]):02}"


def stack_order(stack: str) -> tuple[object, ...]:
    """Sorts stacks of blocks: down, middle, up; refiners first, single blocks last."""
    stage = UNET_STAGES.get(stack.split(".")[0], 3)
    numbers = tuple(int(word) for word in stack.split(".") if is_number(word))
    return stage, "refiner" not in stack, "single_" in stack, numbers, stack


def is_number(word: str) -> bool:
    """Returns True for a number of a usable length; names may come from hostile files."""
    return word.isdecimal() and len(word) < 10


_SPECIAL = ("BASE", "CLIP", "T5", "IN", "M", "D", "S", "OUT")


def _order_place(place: str) -> tuple[object, ...]:
    word = place.rstrip("0123456789")
    number = int(place[len(word) :] or 0)
    if word in _SPECIAL or place in _SPECIAL:
        order = _SPECIAL.index(place if place in _SPECIAL else word)
        return (0, order, number)
    stack, _, number_text = place.rpartition(".")
    return (1, stack_order(stack), int(number_text) if is_number(number_text) else 0)
