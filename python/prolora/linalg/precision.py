"""In what precision arithmetic runs: float32 or better, whatever the storage dtype."""

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps


def working_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 where any operand is float64, else float32; torch promotes no float8 itself."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or Inf; takes float8 too, which `torch.isfinite` does not."""
    return bool((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all())
