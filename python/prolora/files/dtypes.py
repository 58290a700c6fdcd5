"""Dtypes by the names that safetensors headers have for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UnsupportedFormat

if TYPE_CHECKING:
    import torch

_TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_NAMES = {name: dtype for dtype, name in _TORCH.items()}

_STANDARD = "F64 F32 F16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL"
CODES = dict(zip(_STANDARD.split(), "dfeqihbQIHB?", strict=True))
"""Name -> `struct`'s code, which has none for bfloat16 and floats of eight bits."""

# The digits of a name are its bits; those of 8-bit floats name their exponent as well.
SIZES = {
    dtype: 1 if dtype == "BOOL" or dtype.startswith("F8") else int(dtype.lstrip("BFIU")) // 8
    for dtype in _TORCH
}
"""Name -> bytes of a number."""


def is_floating(dtype: str) -> bool:
    """Returns True for the dtypes of real numbers."""
    return dtype.startswith(("F", "BF"))


def spell_dtype(dtype: str) -> str:
    """Returns the name as people know it from torch, `float16`."""
    return _TORCH.get(dtype, dtype)


def find_torch_dtype(dtype: str) -> torch.dtype:
    """Returns torch's dtype of that name.

    Raises:
        UnsupportedFormat: this torch is too old to have it.
    """
    import torch

    torch_dtype: torch.dtype | None = getattr(torch, _TORCH[dtype], None)
    if torch_dtype is None:
        raise UnsupportedFormat(
            f"numbers of type {dtype} need a newer torch than {torch.__version__}: update it"
        )
    return torch_dtype


def name_dtype(dtype: torch.dtype) -> str:
    """Returns the name of torch's dtype, or torch's own where headers have none."""
    plain = str(dtype).removeprefix("torch.")
    return _NAMES.get(plain, plain)
