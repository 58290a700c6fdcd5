"""Blocks of a model that visit the card one at a time.

They rest in the machine's memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.modules import find_block

_PLACE = "prolora_computes_on"
"""Attribute of a parameter that is at rest elsewhere than where it computes."""


def place_of(weight: Tensor) -> torch.device:
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

    A block that is away comes before it runs and goes afterwards. In a forward pass without
    gradients, and in one whose blocks are computed again in the backward pass, one such block is on
    the card at a time, as another tensor under each parameter's name. What autograd saves of it
    when the block is computed again is that tensor, which is freed once its gradients are known. So
    predictions and gradients equal the whole model's on the card. Blocks run in turn, forwards and
    backwards, so that always the same ones stay.

    diffusers' group offloading does not do that: it moves the parameters themselves, so that blocks
    that are computed again stay on the card (torch ends that pass before its hook), or else are
    gone when their gradients are taken, which are then NaN.

    Attributes:
        model: a diffusers UNet or transformer.
        device: the card.
        away: the names of the blocks that are in the machine's memory.
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
        inside = {id(p) for block in self.blocks.values() for p in block.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in inside:
                parameter.data = parameter.data.to(self.device)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.device)
        self._visits = {n: _VisitingBlock(b, self.device) for n, b in self.blocks.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each block."""
        return {name: count_bytes(block) for name, block in self.blocks.items()}

    def keep(self, room: int) -> None:
        """Keeps as many blocks on the card as fit into so many bytes.

        The room is for the blocks alone, and holds the largest of those that are away, too.
        """
        sizes, stay = self.sizes, 0
        names = list(sizes)
        while stay < len(names):
            beyond = max((sizes[name] for name in names[stay + 1 :]), default=0)
            if sum(sizes[name] for name in names[: stay + 1]) + beyond > room:
                break
            stay += 1
        self.away = names[stay:]
        for name, block in self.blocks.items():
            visits = self._visits[name].away = name in self.away
            rests = torch.device("cpu") if visits else self.device
            for parameter in block.parameters():
                parameter.data = parameter.data.to(rests)
                setattr(parameter, _PLACE, self.device)


def bring_weight(weight: Tensor, device: torch.device) -> Tensor:
    """Brings the weight to the card, for as long as it is needed."""
    return weight.to(device)


def count_bytes(module: nn.Module) -> int:
    """Counts the bytes of a module's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


class _VisitingBlock:
    """Hooks of a block that is on the card while it runs."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self.device, self.away = device, False
        self.stored: list[tuple[nn.Module, str, Any]] = []
        block.register_forward_pre_hook(self._bring)
        block.register_forward_hook(self._put_back, always_call=True)

    def _bring(self, block: nn.Module, _: Any) -> None:
        for module in block.modules() if self.away else ():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self.stored.append((module, name, parameter))
                    visiting: Any = bring_weight(parameter.detach(), self.device)
                    module._parameters[name] = visiting

    def _put_back(self, *_: Any) -> None:
        for module, name, parameter in self.stored:
            module._parameters[name] = parameter
        self.stored = []
