"""A denoiser's prediction by noise level, and its conversion to another's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedFormat

EPSILON, VELOCITY, SAMPLE, FLOW = "epsilon", "v_prediction", "sample", "flow"
LEAST_LOG_SNR = -10.0
"""Below it, x₀ from a prediction of ε is ε's error times 150 or more."""
LARGEST_LOG_SNR = 14.0
"""Above it, all predictions but that of x₀ are x₀'s error times 1000 or more."""


@dataclass(frozen=True)
class Times:
    """The time of a denoiser that is linear in the noise level: slope · level + offset."""

    slope: float
    offset: float


@dataclass(frozen=True)
class NoiseSchedule:
    """The convention of a pipeline: x = a·x₀ + b·ε, and its prediction.

    The noise level is u = b/(a + b), from 0 (an image) to 1 (noise); log-SNR = 2·log((1 − u)/u).
    Every prediction is f = c·x₀ + d·x with numbers c and d that depend on the level alone
    (`weights`), so predictions of all kinds can be converted into each other.

    Flows see a = 1 − u, b = u and predict ε − x₀. All others are variance-preserving: a² + b² = 1.
    Their velocity is a·ε − b·x₀.
    """

    kind: str  # "epsilon", "v_prediction", "sample" (x₀) or "flow"
    # Ᾱ by time, falling, float64; None without a table of times
    alphas: Tensor | None = field(repr=False)
    sign: int = 1  # −1 where the model predicts the negative
    times: Times | None = None  # of a flow; None until a pipeline was observed, see `read_flow`
    unit: float = 1000.0  # a flow scheduler's number for level 1: num_train_timesteps

    @classmethod
    def of(cls, scheduler: Any, name: str) -> NoiseSchedule:
        """Reads the convention of a diffusers scheduler."""
        config = scheduler.config
        kind = getattr(config, "prediction_type", None)
        alphas = getattr(scheduler, "alphas_cumprod", None)
        is_flow = "FlowMatch" in type(scheduler).__name__ or kind == "flow_prediction"
        if is_flow and not getattr(config, "invert_sigmas", False):
            return cls(FLOW, None, unit=float(getattr(config, "num_train_timesteps", 1000)))
        continuous = getattr(config, "timestep_type", None) == "continuous"
        if kind not in (EPSILON, VELOCITY, SAMPLE) or alphas is None or continuous:
            raise UnsupportedFormat(
                f"{name}: its scheduler {type(scheduler).__name__} predicts {kind!r}; a fit "
                f"handles {EPSILON}, {VELOCITY} and {SAMPLE} with alphas_cumprod and whole times, "
                "and flow matching. Another scheduler of the same model may say what it predicts"
            )
        return cls(kind, torch.as_tensor(alphas).double().cpu())

    def alpha(self, time: Tensor) -> Tensor:
        """Interpolates ᾱ at (fractional) times linearly."""
        assert self.alphas is not None
        last = len(self.alphas) - 1
        t = time.double().cpu().clamp(0, last)
        low = t.floor().long().clamp_max(last - 1)
        part = t - low
        return self.alphas[low] * (1 - part) + self.alphas[low + 1] * part

    def time(self, alpha: Tensor) -> Tensor:
        """Returns the (fractional) times for ᾱ; the nearer end beyond the table."""
        assert self.alphas is not None
        rising = self.alphas.flip(0).contiguous()
        high = torch.searchsorted(rising, alpha.contiguous()).clamp(1, len(rising) - 1)
        span = (rising[high] - rising[high - 1]).clamp_min(1e-300)
        part = ((alpha - rising[high - 1]) / span).clamp(0, 1)
        return len(rising) - 1 - (high - 1 + part)

    def level_at(self, time: Tensor) -> Tensor:
        """Returns the noise level at times of the model, float64 on the CPU."""
        time = time.double().cpu()
        if self.alphas is not None:
            return _level_of_alpha(self.alpha(time))
        times = self._known_times()
        return ((time - times.offset) / times.slope).clamp(0, 1)

    def time_at(self, level: Tensor) -> Tensor:
        """Returns the model's times at noise levels; the nearer end beyond its range."""
        level = level.double().cpu()
        if self.alphas is not None:
            signal, noise = (1 - level).square(), level.square()
            return self.time(signal / (signal + noise))
        times = self._known_times()
        return times.slope * level + times.offset

    def _known_times(self) -> Times:
        if self.times is None:
            raise RuntimeError("the times of a flow are known once its pipeline was observed")
        return self.times

    def scales(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a and b of x = a·x₀ + b·ε at a noise level."""
        if self.kind == FLOW:
            return 1 - level, level
        size = (level.square() + (1 - level).square()).sqrt()
        return (1 - level) / size, level / size

    def weights(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Returns c and d of f = c·x₀ + d·x at a noise level."""
        a, b = self.scales(level)
        if self.kind == SAMPLE:
            c, d = torch.ones_like(level), torch.zeros_like(level)
        elif self.kind == EPSILON:
            c, d = -a / b, 1 / b
        elif self.kind == FLOW:
            c, d = -1 / b, 1 / b  # ε − x₀ = (x − a·x₀)/b − x₀, and a + b = 1
        else:
            c, d = -1 / b, a / b
        return self.sign * c, self.sign * d

    @property
    def levels(self) -> tuple[float, float]:
        """The noise levels at which the model's answer says something of x₀."""
        low, high = (log_snr_level(x) for x in (LARGEST_LOG_SNR, LEAST_LOG_SNR))
        if self.kind != EPSILON:
            high = 1.0
        if self.kind == SAMPLE:
            low = 0.0
        if self.alphas is not None:
            least, largest = _level_of_alpha(self.alphas[[0, -1]]).tolist()
            return max(low, least), min(high, largest)
        return low, high


def _level_of_alpha(alpha: Tensor) -> Tensor:
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    return noise / (signal + noise)


def log_snr_level(log_snr: float) -> float:
    """Returns the noise level at a log-SNR."""
    return 1 / (1 + math.exp(log_snr / 2))


def level_log_snr(level: float) -> float:
    """Returns the log-SNR at a noise level, infinite at its ends."""
    if level <= 0 or level >= 1:
        return math.inf if level <= 0 else -math.inf
    return 2 * math.log((1 - level) / level)


def align_rows(factor: Tensor, like: Tensor) -> Tensor:
    """Gives a number, or one for each sample, a batch's axes and precision."""
    factor = factor.to(like.device, torch.promote_types(like.dtype, torch.float32))
    return factor.reshape(-1, *[1] * (like.dim() - 1))
