"""The weights of a checkpoint, whatever they are quantised as."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..weights import Weight
from .bitsandbytes import join_bitsandbytes
from .comfy import join_comfy
from .parts import CheckpointParts, Metadata

_WHOLE = "use the fp16 or bf16 version of this model, or GGUF"
_SAVE = f"{_WHOLE}; or load it with that library and save `weight.dequantize()` of every layer"
_REFUSED = (
    ("quanto", re.compile(r"(?:^|\.)weight\._(?:data|scale|shift)(?:\._\w+)?$"), _SAVE),
    ("torchao", re.compile(r"(?:^|\.)_weight_(?:qdata|scale|zero_point)$"), _SAVE),
    ("nunchaku (SVDQuant)", re.compile(r"(?:^|\.)(?:wscales|wzeros|smooth_factor\w*)$"), _WHOLE),
    (
        "a kind that is not known",
        re.compile(
            r"(?:^|\.)(?:weight_scale_\w+|scale_weight_\w+|pre_quant_scale|absmax|nested_absmax"
            r"|quant_map|nested_quant_map|quant_state\..*|SCB|qweight|qzeros|scales|g_idx)$"
        ),
        _WHOLE,
    ),
)
"""What quantised a checkpoint, keys that tell it, and the way out."""


def join_quantised(
    weights: Mapping[str, Weight], metadata: Iterable[Metadata], where: str
) -> dict[str, Weight]:
    """Joins the parts of every quantised weight, in the order of the file.

    `metadata` comes from the headers of the checkpoint's files.

    Raises:
        UnsupportedFormat: a kind of quantisation whose shapes are not known, or parts that are
            missing or do not fit together.
    """
    parts = CheckpointParts(weights, tuple(metadata), where)
    for join in (join_bitsandbytes, join_comfy):
        join(parts)
    for kind, keys, way_out in _REFUSED:
        if (key := next(filter(keys.search, parts), None)) is not None:
            raise parts.refuse(
                f"a quantised checkpoint of {kind} ({key}), which is not read: {way_out}"
            )
    return parts.list_weights()
