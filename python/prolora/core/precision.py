"""In what precision arithmetic runs: float32 or better, whatever the storage dtype."""

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps


def working_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 where any operand is float64, else float32; torch promotes no float8 itself."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or Inf; takes float8 too, which `torch.isfinite` does not.

    A finite sum has finite terms: one pass that allocates nothing decides almost every tensor. The
    sum of finite values can overflow, and then every value is looked at.
    """
    values = tensor.float() if tensor.element_size() == 1 else tensor
    if values.is_floating_point():
        if bool(values.sum(dtype=working_dtype(values.dtype)).isfinite()):
            return True
    return bool(values.isfinite().all())
