"""What prolora refuses, as exceptions: each message names the tensor or file and the way out."""


class ProLoRAError(ValueError):
    """Base class of everything prolora refuses."""


class UnsupportedFormat(ProLoRAError):
    """A file, key or adapter type that prolora cannot read exactly, or will not guess at."""


class ShapeMismatch(ProLoRAError):
    """A tensor whose shape does not fit the module it is meant for."""


class NonFiniteWeights(ProLoRAError):
    """NaN or Inf in a weight or an update."""


class LowCoverage(ProLoRAError):
    """Fewer modules (or less energy) could be transferred than the caller asked for."""


class UnrelatedBases(ProLoRAError):
    """The two bases share too little for any update to keep its meaning."""


class OutputError(ProLoRAError):
    """The output cannot be written where the caller wants it, or would overwrite an input."""
