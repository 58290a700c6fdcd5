"""What the mathematics refuses: each message names the tensor and the way out."""

from __future__ import annotations

from typing import ClassVar


class ProLoRAError(ValueError):
    """Base class of everything prolora refuses.

    Attributes:
        code: the name of this kind of error, the same in every version.
        command: a command line that helps, at the end of the message; "" for none.
    """

    code: ClassVar[str] = "refused"
    command: str = ""

    def to_dict(self) -> dict[str, str]:
        """Returns the error ready for JSON: its type, its code and the message."""
        return {"type": type(self).__name__, "code": self.code, "message": str(self)}


class ShapeMismatch(ProLoRAError):
    """A tensor whose shape does not fit its module."""

    code = "shape-mismatch"


class UnsupportedTensor(ProLoRAError, TypeError):
    """A tensor or array that the mathematics is not made for."""

    code = "unsupported-tensor"


class UnsupportedDevice(ProLoRAError, RuntimeError):
    """A device that prolora does not support or this machine lacks."""

    code = "unsupported-device"


class SolverFailure(ProLoRAError, RuntimeError):
    """No SVD or eigenvalue solver gave a result for finite weights."""

    code = "solver-failure"


class KernelFailure(ProLoRAError, RuntimeError):
    """A kernel of prolora's compiled extension that did not run."""

    code = "kernel-failure"


class NoDerivative(ProLoRAError, NotImplementedError):
    """A derivative asked for with respect to what has none."""

    code = "no-derivative"


class NonFiniteWeights(ProLoRAError):
    """NaN or Inf in a weight, an update, or a model's output."""

    code = "non-finite-weights"


class UnrelatedBases(ProLoRAError):
    """Two bases too different for any update to keep its meaning."""

    code = "unrelated-bases"
