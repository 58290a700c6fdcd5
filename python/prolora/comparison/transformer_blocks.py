"""Transformer blocks of a base in order, and comparable blocks of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..architectures.depth import stack_order
from ..architectures.modules import find_block, is_adaptable, matrix_shape
from ..bases import Base


@dataclass(frozen=True)
class Block:
    """One transformer block."""

    stack: str  # the stack it is in, `down_blocks.2.attentions.0.transformer_blocks`
    index: int  # its number there
    # Module name inside the block -> out × in
    shapes: Mapping[str, tuple[int, int]] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """What its modules' names begin with."""
        return f"{self.stack}.{self.index}"


BlockGroup = tuple[list[Block], list[Block]]
"""Blocks of the source and of the target with modules of the same names and shapes."""


def list_blocks(base: Base) -> list[Block]:
    """Lists the transformer blocks of a base in the order of a forward pass."""
    modules: dict[tuple[str, int], dict[str, tuple[int, int]]] = {}
    for module, shape in base.shapes.items():
        block = find_block(module)
        if block and is_adaptable(module):
            key = block.stack, int(block.number)
            modules.setdefault(key, {})[block.local] = matrix_shape(shape)
    ordered = sorted(modules, key=lambda key: (stack_order(key[0]), key[1]))
    return [Block(*key, modules[key]) for key in ordered]


def group_blocks(source: Base, target: Base) -> list[BlockGroup]:
    """Groups blocks of both bases with the same kind, modules and shapes."""
    sources, targets = list_blocks(source), list_blocks(target)
    shared = {name for block in sources for name in block.shapes}
    shared &= {name for block in targets for name in block.shapes}

    def signature(block: Block) -> tuple[object, ...]:
        kind = block.stack.rpartition(".")[2]
        shapes = [(name, shape) for name, shape in block.shapes.items() if name in shared]
        return kind, tuple(sorted(shapes))

    groups: dict[tuple[object, ...], tuple[list[Block], list[Block]]] = {}
    for side, list_ in enumerate((sources, targets)):
        for block in list_:
            groups.setdefault(signature(block), ([], []))[side].append(block)
    return [pair for (_, shapes), pair in groups.items() if shapes and all(pair)]
