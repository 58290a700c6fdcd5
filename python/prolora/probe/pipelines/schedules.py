"""What a denoiser predicts at which noise level, and conversion between two conventions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedFormat

EPSILON, VELOCITY, FLOW = "epsilon", "v_prediction", "flow"


@dataclass(frozen=True)
class Schedule:
    """The convention of a pipeline, from its scheduler.

    Variance-preserving models see x = √ᾱ·x₀ + √(1−ᾱ)·ε at the time t whose ᾱ the scheduler lists.

    Attributes:
        kind: "epsilon", "v_prediction" (√ᾱ·ε − √(1−ᾱ)·x₀) or "flow".
        alphas: ᾱ by time, falling, float64; None for flows.
    """

    kind: str
    alphas: Tensor | None

    @classmethod
    def of(cls, scheduler: Any, name: str) -> Schedule:
        """The convention of a diffusers scheduler.

        Raises:
            UnsupportedFormat: the scheduler has another convention.
        """
        kind = getattr(scheduler.config, "prediction_type", None)
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if "FlowMatch" in type(scheduler).__name__ or kind == "flow_prediction":
            return cls(FLOW, None)
        if kind in (EPSILON, VELOCITY) and alphas is not None:
            return cls(kind, torch.as_tensor(alphas).double().cpu())
        raise UnsupportedFormat(
            f"{name}: its scheduler {type(scheduler).__name__} predicts {kind!r}; probing handles "
            f"{EPSILON} and {VELOCITY} with alphas_cumprod, and flow matching"
        )

    def alpha(self, time: Tensor) -> Tensor:
        """ᾱ at (fractional) times, by linear interpolation."""
        assert self.alphas is not None
        last = len(self.alphas) - 1
        t = time.double().cpu().clamp(0, last)
        low = t.floor().long().clamp_max(last - 1)
        part = t - low
        return self.alphas[low] * (1 - part) + self.alphas[low + 1] * part

    def time(self, alpha: Tensor) -> Tensor:
        """The (fractional) times at which ᾱ is reached; the nearer end where it never is."""
        assert self.alphas is not None
        rising = self.alphas.flip(0).contiguous()
        high = torch.searchsorted(rising, alpha.contiguous()).clamp(1, len(rising) - 1)
        span = (rising[high] - rising[high - 1]).clamp_min(1e-300)
        part = ((alpha - rising[high - 1]) / span).clamp(0, 1)
        return len(rising) - 1 - (high - 1 + part)


def translate_time(ours: Schedule, theirs: Schedule, time: Tensor) -> Tensor:
    """The time at which the other model sees as much noise; the same time for equal schedules."""
    if ours.alphas is None or theirs.alphas is None:
        return time
    if ours.alphas.shape == theirs.alphas.shape and torch.allclose(
        ours.alphas, theirs.alphas, rtol=1e-5, atol=1e-9
    ):
        return time
    return theirs.time(ours.alpha(time)).to(time.device)


def convert_prediction(
    ours: Schedule, theirs: Schedule, latent: Tensor, time: Tensor, prediction: Tensor
) -> Tensor:
    """Converts a prediction to the kind of another schedule: ε = √ᾱ·v + √(1−ᾱ)·x and back.

    Args:
        ours: schedule of the model that predicted.
        theirs: schedule of the other model.
        latent: x [n, ...], the input of the model that predicted.
        time: at which it predicted, [] or [n].
        prediction: [n, ...].
    """
    if ours.kind == theirs.kind:
        return prediction
    alpha = ours.alpha(time).to(prediction.device, torch.float32)
    alpha = alpha.reshape(-1, *[1] * (prediction.dim() - 1))
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    if theirs.kind == EPSILON:
        return signal * prediction + noise * latent
    return (prediction - noise * latent) / signal


def check_schedules(
    source: Schedule, target: Schedule, same_class: bool, names: tuple[str, str]
) -> None:
    """Refuses conventions that cannot be converted into each other.

    Raises:
        UnsupportedFormat: one is a flow and the other variance-preserving; or both are flows, of
            two architectures, whose times may have different meanings.
    """
    if FLOW not in (source.kind, target.kind):
        return
    if source.kind != target.kind:
        raise UnsupportedFormat(
            f"{names[0]} predicts {source.kind} and {names[1]} {target.kind}: probing does not "
            "translate between flow matching and noise prediction"
        )
    if not same_class:
        raise UnsupportedFormat(
            f"{names[0]} and {names[1]} are flows of two architectures, whose times may "
            "have different meanings; probing moves between flows of one architecture only"
        )
