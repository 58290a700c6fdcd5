"""What the mathematics refuses: each message names the tensor and the way out."""


class ProLoRAError(ValueError):
    """Base class of everything prolora refuses.

    Attributes:
        command: a command line that helps, with which the message ends; "" where there is none.
    """

    command: str = ""


class ShapeMismatch(ProLoRAError):
    """A tensor whose shape does not fit the module it is meant for."""


class UnsupportedTensor(ProLoRAError, TypeError):
    """A tensor or array that the mathematics is not made for."""


class UnsupportedDevice(ProLoRAError, RuntimeError):
    """A device that prolora does not compute on, or that this machine does not have."""


class SolverFailure(ProLoRAError, RuntimeError):
    """No SVD or eigenvalue solver gave a result for finite weights."""


class NonFiniteWeights(ProLoRAError):
    """NaN or Inf in a weight or an update, or in what a model makes of them."""


class UnrelatedBases(ProLoRAError):
    """The two bases share too little for any update to keep its meaning."""
