"""Keys and shapes of a family's checkpoints in either spelling."""

from __future__ import annotations

from family_files import collect_weights, name_key

from prolora.architectures.families import known_families
from prolora.architectures.family import Family

Shapes = dict[str, tuple[int, ...]]
TRANSFORMERS = [
    (family.id, id_)
    for family in known_families().values()
    if not family.unet
    for id_ in family.layouts
]
"""(family, layout) of every published size."""


def list_diffusers_keys(shapes: Shapes) -> Shapes:
    """The keys of a checkpoint in diffusers' names."""
    return {name_key(name): shape for name, shape in shapes.items()}


def list_authors_keys(family: Family, shapes: Shapes) -> Shapes:
    """The keys of a checkpoint in the authors' names: rows of the modules they hold added up."""
    return {
        name_key(weight.name): (
            sum(shapes[part][0] for part in weight.parts),
            *shapes[weight.parts[0]][1:],
        )
        for weight in collect_weights(family, shapes).values()
    }
