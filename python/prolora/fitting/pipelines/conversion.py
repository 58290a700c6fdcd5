"""One question to two models of different kinds: at equal log-SNR, answered in terms of x₀."""

from __future__ import annotations

import torch
from torch import Tensor

from .schedules import NoiseSchedule


def translate_time(ours: NoiseSchedule, theirs: NoiseSchedule, time: Tensor) -> Tensor:
    """Returns the time at which the other model sees as much noise.

    Equal schedules have the same time. Where a table of discrete times lies between two entries,
    the result is a fraction: diffusers' models embed times by sinusoids, which take fractions.
    """
    if ours.has_same_times(theirs):
        return time
    if ours.alphas is not None and theirs.alphas is not None:
        return theirs.time(ours.alpha(time)).to(time.device)
    return theirs.time_at(ours.level_at(time)).to(time.device)


def translate_state(
    ours: NoiseSchedule, theirs: NoiseSchedule, latent: Tensor, time: Tensor
) -> Tensor:
    """Scales x [n, ...] to the other model's state of the same x₀ and ε.

    The log-SNR is the same, so it is a multiple.
    """
    if ours.has_same_path(theirs):
        return latent
    level = ours.level_at(time)
    (a, b), (a_theirs, b_theirs) = ours.scales(level), theirs.scales(level)
    return latent * align_rows(torch.hypot(a_theirs, b_theirs) / torch.hypot(a, b), latent)


def convert_prediction(
    ours: NoiseSchedule, theirs: NoiseSchedule, latent: Tensor, time: Tensor, prediction: Tensor
) -> Tensor:
    """Converts a prediction to the other model's at the same log-SNR and x₀.

    From f = c·x₀ + d·x on both sides: f' = (c'/c)·f + (d'·r − (c'/c)·d)·x, where x' = r·x. So a
    change of x₀ is a change c'/c times that of f.

    `latent` x [n, ...] is the input of the model that predicted, at times [] or [n].
    """
    if ours.predicts_alike(theirs):
        return prediction if ours.sign == theirs.sign else -prediction
    level = ours.level_at(time)
    (a, b), (a_theirs, b_theirs) = ours.scales(level), theirs.scales(level)
    (c, d), (c_theirs, d_theirs) = ours.weights(level), theirs.weights(level)
    share = c_theirs / c
    rest = d_theirs * torch.hypot(a_theirs, b_theirs) / torch.hypot(a, b) - share * d
    return align_rows(share, prediction) * prediction + align_rows(rest, prediction) * latent


def clip_state(
    schedule: NoiseSchedule, levels: tuple[float, float], latent: Tensor, time: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the nearest state and time with a noise level within bounds.

    A state with more noise than the bound becomes the state of x₀ = 0 and the same ε at the bound;
    one with less keeps its signal. States within the bounds are returned as they are.
    """
    level = schedule.level_at(time)
    bound = level.clamp(*levels)
    outside = (level - bound).abs() > 1e-6
    if not bool(outside.any()):
        return latent, time
    (a, b), (a_bound, b_bound) = schedule.scales(level), schedule.scales(bound)
    factor = torch.where(level > bound, b_bound / b, a_bound / a.clamp_min(1e-12))
    factor = torch.where(outside, factor, torch.ones_like(factor))
    clipped = torch.where(outside, schedule.time_at(bound), time.double().cpu())
    return latent * align_rows(factor, latent), clipped.to(time.device)


def common_levels(ours: NoiseSchedule, theirs: NoiseSchedule) -> tuple[float, float] | None:
    """Returns the noise levels at which both can be asked; None without a bound.

    Models of one kind are not bounded: their predictions need no conversion.
    """
    if ours.predicts_alike(theirs):
        return None
    bounds = ours.levels, theirs.levels
    return max(low for low, _ in bounds), min(high for _, high in bounds)


def align_rows(factor: Tensor, like: Tensor) -> Tensor:
    """Gives a number, or one for each sample, a batch's axes and precision."""
    factor = factor.to(like.device, torch.promote_types(like.dtype, torch.float32))
    return factor.reshape(-1, *[1] * (like.dim() - 1))
