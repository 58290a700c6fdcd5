"""What prolora refuses, as exceptions: each message names the tensor or file and the way out."""

from .core.errors import NonFiniteWeights, ProLoRAError, ShapeMismatch

__all__ = [
    "InvalidOption",
    "LowCoverage",
    "NonFiniteWeights",
    "OutputError",
    "ProLoRAError",
    "ShapeMismatch",
    "TooLittleMemory",
    "UnrelatedBases",
    "UnsupportedFormat",
]


class UnsupportedFormat(ProLoRAError):
    """A file, key or adapter type that prolora cannot read exactly, or will not guess at."""


class LowCoverage(ProLoRAError):
    """Fewer modules (or less energy) could be transferred than the caller asked for."""


class UnrelatedBases(ProLoRAError):
    """The two bases share too little for any update to keep its meaning."""


class OutputError(ProLoRAError):
    """The output cannot be written where the caller wants it, or would overwrite an input."""


class TooLittleMemory(ProLoRAError):
    """A bound on memory below what a single matrix needs."""


class InvalidOption(ProLoRAError):
    """An option has a value that it does not take."""
