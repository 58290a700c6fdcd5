"""Mappings that read each weight on request, as bases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..adapters.contents import parse_contents
from ..adapters.file_model import BaseNames
from ..adapters.keys.codec import Codec
from ..architectures.families import known_families
from ..architectures.layouts import known_layouts, load_layout
from ..bases import open_base
from ..core.arrays import to_tensor
from ..verbs.options import LoraLike, use_lora


def narrow_base(base: Any, *loras: LoraLike) -> Any:
    """Opens a mapping that is not a dict for some LoRAs; returns any other base.

    Only modules that the LoRAs change are read. Other shapes come from the published size whose
    names the mapping has; without one the base is these modules alone.
    """
    if not isinstance(base, Mapping) or isinstance(base, dict):
        return base
    paths = {key: key.removesuffix(".weight") for key in base}
    wanted_modules, changed, ids = frozenset(paths.values()), set[str](), list[str]()
    for lora in loras:
        with use_lora(lora) as opened:
            ids += opened.model.names
            if isinstance(opened, Adapter):
                changed |= opened.updates.keys()
            else:
                slots = parse_contents(opened, BaseNames(modules=wanted_modules)).slots
                changed |= {name for slot in slots for name in slot.module.modules}
    family = known_families().get(ids[0]) if ids else None
    codec = Codec(family, names={name: name for name in wanted_modules})
    parsed = {key: codec.read(path) for key, path in paths.items()}
    modules = {key: module.modules for key, module in parsed.items() if module}
    wanted = [key for key in modules if not changed.isdisjoint(modules[key])]
    outline = {key: to_tensor(base[key], key).detach().to("meta") for key in wanted}
    fitting = [
        shapes
        for id_ in known_layouts()
        if (shapes := _fuse_shapes(load_layout(id_).shapes, modules))
        and all(shapes.get(key) == outline[key].shape for key in wanted)
    ]
    published = max(fitting, key=len, default={})
    shaped = {key: torch.empty(shape, device="meta") for key, shape in published.items()}
    return open_base(shaped | outline, read=base.__getitem__)


def _fuse_shapes(
    shapes: Mapping[str, tuple[int, ...]], modules: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[int, ...]]:
    """Returns key -> shape of the matrices of a published size; {} where one is missing."""
    own = {key: names for key, names in modules.items() if shapes.keys() >= {*names}}
    if len({name for names in own.values() for name in names}) < len(shapes):
        return {}
    return {
        key: (sum(shapes[name][0] for name in names), *shapes[names[0]][1:])
        for key, names in own.items()
    }
