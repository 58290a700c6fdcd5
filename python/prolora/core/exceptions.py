"""Errors of the mathematics. Each message names the tensor and the remedy."""

from __future__ import annotations

from typing import ClassVar

from .controls import replace_controls


class ProLoRAError(ValueError):
    """Base class of all errors that prolora raises for invalid input.

    Attributes:
        code: identifier of the error class, the same in every version, for example
            "shape-mismatch".
        command: a command line that solves the problem, printed after the message; "" if none.
    """

    code: ClassVar[str] = "refused"
    command: str = ""

    def __str__(self) -> str:
        """Returns the message, with control characters of names in files spelled out."""
        return replace_controls(super().__str__())

    def to_dict(self) -> dict[str, str]:
        """Returns the error ready for JSON: its type, its code and the message."""
        return {"type": type(self).__name__, "code": self.code, "message": str(self)}


class ShapeMismatch(ProLoRAError):
    """A tensor whose shape does not fit its module."""

    code = "shape-mismatch"


class UnsupportedTensor(ProLoRAError, TypeError):
    """An unsupported tensor or array, for example a sparse or complex one."""

    code = "unsupported-tensor"


class UnsupportedDevice(ProLoRAError, RuntimeError):
    """A device that prolora does not support or this machine lacks."""

    code = "unsupported-device"


class SolverFailure(ProLoRAError, RuntimeError):
    """No SVD or eigenvalue solver returned a result for finite weights."""

    code = "solver-failure"


class KernelFailure(ProLoRAError, RuntimeError):
    """A kernel of the compiled extension failed."""

    code = "kernel-failure"


class NoDerivative(ProLoRAError, NotImplementedError):
    """Gradients with respect to the weights are not supported."""

    code = "no-derivative"


class NonFiniteWeights(ProLoRAError):
    """NaN or Inf in a weight, an update, or a model's output."""

    code = "non-finite-weights"


class UnrelatedBases(ProLoRAError):
    """Two models, or two weights, that are not related."""

    code = "unrelated-bases"


class TooLittleMemory(ProLoRAError):
    """A memory limit that is too small for a single pair of weights."""

    code = "too-little-memory"
