"""Blocks of a model that visit the card one at a time.

They rest in the machine's memory, pinned; the next one is copied while one runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.modules import find_block
from ..bases.upload import Copies, GpuCopies

_PLACE = "prolora_computes_on"
"""Attribute of a parameter that is at rest elsewhere than where it computes."""
_CHUNK, _ALIGNED = 2**30, 256
"""Bytes that are pinned at a time: torch pins powers of two, up to twice a weight's size."""


def compute_device(weight: Tensor) -> torch.device:
    """Returns the device that a weight computes on, wherever it rests."""
    place: torch.device = getattr(weight, _PLACE, weight.device)
    return place


def name_blocks(model: nn.Module) -> list[str]:
    """Lists a model's transformer blocks in the order of their registration.

    `find_block` finds them by the names of the model's linear modules: an item of
    `transformer_blocks` in a UNet, of an outermost list (`blocks`, `layers`, `context_refiner`, …)
    in any other model.
    """
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    positions = (position for name in linear if (position := find_block(name)))
    return list(dict.fromkeys(f"{position.stack}.{position.number}" for position in positions))


class BlockSwapping:
    """A model on a card; blocks beyond its room stay in memory.

    A block that is away comes before it runs and goes afterwards, and where the room holds two, the
    next one is copied while it runs. In a forward pass without gradients, and in one whose blocks
    are computed again in the backward pass, no others are on the card, as other tensors under each
    parameter's name. What autograd saves of a block that is computed again are those tensors, which
    are freed once its gradients are known. So predictions and gradients equal the whole model's on
    the card. Blocks run in turn, forwards and backwards, so that always the same ones stay, and the
    next one is known from the second pass on.

    diffusers' group offloading does not do that: it moves the parameters themselves, so that blocks
    that are computed again stay on the card (torch ends that pass before its hook), or else are
    gone when their gradients are taken, which are then NaN.

    Attributes:
        model: a diffusers UNet or transformer.
        device: the card.
        away: the names of the blocks that are in the machine's memory.
        ahead: whether the next block is copied while one runs.
    """

    def __init__(self, model: nn.Module, device: torch.device | str) -> None:
        """Moves all but the blocks to the card; `keep` says which of them follow."""
        self.model, self.device = model, torch.device(device)
        self.blocks = {name: model.get_submodule(name) for name in name_blocks(model)}
        first = next(iter(model.parameters()), None)  # whose device counts as the model's
        self.blocks = {
            name: block
            for name, block in self.blocks.items()
            if all(parameter is not first for parameter in block.parameters())
        }
        self.away: list[str] = []
        self.ahead = False
        self._copies: Copies = (
            GpuCopies(self.device) if self.device.type == "cuda" else _PlainCopies(self.device)
        )
        self._begun: dict[str, Any] = {}  # block -> its copies, at most one
        self._stored: list[tuple[nn.Module, str, Any]] = []
        self._order: list[str] = []  # of the blocks that are away, as they first ran
        self._last = 0
        inside = {id(p) for block in self.blocks.values() for p in block.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in inside:
                parameter.data = parameter.data.to(self.device)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.device)
        for name, block in self.blocks.items():
            block.register_forward_pre_hook(partial(self._bring, name))
            block.register_forward_hook(self._put_back, always_call=True)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each block."""
        blocks = self.blocks.items()
        return {name: sum(x.nbytes for x in block.parameters()) for name, block in blocks}

    def keep(self, room: int) -> None:
        """Keeps as many blocks on the card as fit into so many bytes.

        The room is for the blocks alone, and holds the largest of those that are away, twice where
        it can.
        """
        self._begun.clear()
        self._order.clear()
        names, sizes = list(self.blocks), list(self.sizes.values())
        stay = count_staying(sizes, room)
        self.away = names[stay:]
        self.ahead = copies_ahead(sizes, room)
        rest = _PinnedMemory() if self.device.type == "cuda" else None
        for name, block in self.blocks.items():
            for parameter in block.parameters():
                if name not in self.away:
                    parameter.data = parameter.data.to(self.device)
                elif rest is None or not parameter.data.is_pinned():
                    there = parameter.data.to("cpu")
                    parameter.data = there if rest is None else rest.take(there)
                setattr(parameter, _PLACE, self.device)

    def _bring(self, name: str, block: nn.Module, _: Any) -> None:
        if name not in self.away:
            return
        begun = self._begun.pop(name, None)
        self._begun.clear()
        there = self._copies.finish(begun or self._start(name))
        for (module, key, parameter), weight in zip(_list_weights(block), there, strict=True):
            self._stored.append((module, key, parameter))
            visiting: Any = weight
            module._parameters[key] = visiting
        if name not in self._order:
            self._order.append(name)
        number = self._order.index(name)
        # On as before; after the last one come the backward pass and its blocks from the end.
        step = number - self._last or -1
        following = number + (step if abs(step) == 1 else 1)
        self._last = number
        if self.ahead and 0 <= following < len(self._order):
            self._begun[self._order[following]] = self._start(self._order[following])

    def _start(self, name: str) -> Any:
        return self._copies.start([w.detach() for *_, w in _list_weights(self.blocks[name])])

    def _put_back(self, *_: Any) -> None:
        for module, name, parameter in self._stored:
            module._parameters[name] = parameter
        self._stored = []


def copies_ahead(sizes: Sequence[int], room: int) -> bool:
    """Returns whether blocks of these sizes leave room for the next one to be copied."""
    return room >= 2 * max(sizes, default=0)


def count_staying(sizes: Sequence[int], room: int) -> int:
    """Counts the first blocks that can stay beside the visitors."""
    visitors = 1 + copies_ahead(sizes, room)
    stay = 0
    while stay < len(sizes):
        beyond = sizes[stay + 1 :]
        if sum(sizes[: stay + 1]) + min(visitors, len(beyond)) * max(beyond, default=0) > room:
            break
        stay += 1
    return stay


class _PlainCopies:
    """Copies that are made when they are begun."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [bring_weight(tensor, self.device) for tensor in tensors]

    def finish(self, copies: list[Tensor]) -> list[Tensor]:
        return copies


class _PinnedMemory:
    """Pinned chunks of memory, from which tensors take their parts."""

    def __init__(self, pin: bool = True) -> None:
        self.pin, self.chunk, self.used = pin, torch.empty(0, dtype=torch.uint8), 0

    def take(self, tensor: Tensor) -> Tensor:
        """Returns a copy of a tensor in the memory."""
        size = tensor.nbytes
        if self.used + size > len(self.chunk):
            fresh = max(size, _CHUNK)
            self.chunk = torch.empty(fresh, dtype=torch.uint8, pin_memory=self.pin)
            self.used = 0
        part = self.chunk[self.used : self.used + size].view(tensor.dtype).view(tensor.shape)
        self.used += math.ceil(size / _ALIGNED) * _ALIGNED
        return part.copy_(tensor)


def bring_weight(weight: Tensor, device: torch.device) -> Tensor:
    """Brings the weight to the card, for as long as it is needed."""
    return weight.to(device)


def _list_weights(block: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [
        (module, name, parameter)
        for module in block.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
