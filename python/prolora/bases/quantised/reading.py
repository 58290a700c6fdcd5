"""The weights of a checkpoint, whatever they are quantised as."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..weights import Weight
from .bitsandbytes import join_bitsandbytes
from .comfy import join_comfy
from .nunchaku import join_nunchaku
from .parts import CheckpointParts, Metadata
from .quanto import join_quanto
from .torchao import join_torchao

_UNKNOWN = re.compile(
    r"(?:^|\.)(?:weight_scale_\w+|scale_weight_\w+|pre_quant_scale|absmax|nested_absmax|quant_map"
    r"|nested_quant_map|quant_state\..*|SCB|qweight|qzeros|scales|g_idx|wscales|smooth_factor\w*"
    r"|weight\._(?:data|scale|shift)(?:\._\w+)?|_weight_qdata)$"
)


def join_quantised(
    weights: Mapping[str, Weight], metadata: Iterable[Metadata], where: str
) -> dict[str, Weight]:
    """The weights with the parts of every quantised one made one, in the order of the file.

    Args:
        weights: all keys of a checkpoint.
        metadata: of the headers of its files.
        where: what messages call the checkpoint.

    Raises:
        UnsupportedFormat: a kind of quantisation whose shapes are not known, or parts that are
            missing or do not fit together.
    """
    parts = CheckpointParts(weights, tuple(metadata), where)
    for join in (join_bitsandbytes, join_quanto, join_torchao, join_nunchaku, join_comfy):
        join(parts)
    if (key := next((key for key in parts if _UNKNOWN.search(key)), None)) is not None:
        raise parts.refuse(
            f"a quantised checkpoint ({key}) of a kind that is not read; use the fp16 or bf16 "
            "version, or GGUF"
        )
    return parts.list_weights()
