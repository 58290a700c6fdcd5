"""Outputs, read back as any user would: which modules they mean, at which scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import OutputError, ProLoRAError
from .adapter import Adapter
from .contents import parse_contents, read_scale
from .family_guess import BaseNames
from .lora import Lora, StrPath


def verify_output(
    output: Path | Mapping[str, Tensor],
    adapter: Adapter,
    scales: Mapping[str, float],
    where: StrPath,
) -> None:
    """Opens an output and compares what its keys, shapes and scales mean.

    The bits of a file were compared when it was filled.

    Args:
        output: a file, a PEFT folder or a state dict.
        adapter: what the output means.
        scales: module -> the scale in front of its tensors.
        where: its name in messages.

    Raises:
        OutputError: something reads back differently.
    """
    updates, biases = set(adapter.updates), set(adapter.vectors)
    try:
        with Lora.open(output) as back:
            contents = parse_contents(back, BaseNames(adapter.family, adapter.updates))
            for slot in contents.slots:
                owned = [name for name in slot.module.modules if name in adapter.updates]
                if not owned:
                    raise OutputError(f"{where}: {slot.module.name} was not written, and is there")
                name, plain = owned[0], slot.kind in ("lora", "locon")
                if not math.isclose(read_scale(slot, back), scales[name], rel_tol=1e-6):
                    raise OutputError(f"{where}: {name} reads back at another scale")
                if plain and slot.kernel != adapter.kernels.get(name):
                    raise OutputError(f"{where}: {name} reads back with another kernel")
                updates -= set(owned)
    except OutputError:
        raise
    except ProLoRAError as error:
        raise OutputError(f"{where}: was written but cannot be read back: {error}") from error
    for one in contents.vectors:
        biases -= {f"{name}.{one.tensor}" for name in one.module.modules}
    if updates or biases:
        name = min(updates | biases)
        raise OutputError(f"{where}: reads back with other modules than written: no {name}")
