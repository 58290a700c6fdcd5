"""Whether a probed LoRA should be used: measured on trajectories that it was not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.lowrank import LowRank
from .trajectories import Call, apply_updates, output_of, predict_call

GO, WEAKEN, COPY, REFUSE = "go", "weaken", "copy", "refuse"
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
MIN_SHARE = 0.25
MAX_DISAGREEMENT = 3.0
COPY_SERVES = 0.5
"""A copy that reaches this share is one between related bases."""
MAX_START = 0.35
"""Disagreement up to which a copy that serves is bettered by a fit: beyond it, only spoilt."""


@dataclass(frozen=True)
class WantedChange:
    """What the target should predict at one held-out call.

    Attributes:
        call: its inputs.
        plain: the target's prediction without updates.
        change: source with LoRA minus source, in the target's terms.
        apart: target minus source, both without updates.
    """

    call: Call
    plain: Tensor
    change: Tensor
    apart: Tensor


@dataclass(frozen=True)
class Gate:
    """The verdict of the held-out probes.

    Attributes:
        decision: "go", "weaken", "copy" where the source's LoRA as it is does no worse on the same
            probes, or "refuse".
        strength: the factor on every update: the one of STRENGTHS with the largest share.
        share: origin -> 1 − Σ‖achieved − wanted‖²/Σ‖wanted‖² of the change of the prediction, at
            that strength. 1 is perfect, 0 as good as no LoRA.
        disagreement: origin -> Σ‖v_target − v_source‖²/Σ‖wanted‖². Where the bases differ by much
            more than the LoRA's own change, what the source wants says little about the target.
        reason: one sentence.
        copy_share: what `share` is for the source's LoRA copied, at the strength in STRENGTHS that
            is best for it; None where its modules or shapes are not the target's.
        copy_strength: that strength.
    """

    decision: str
    strength: float
    share: dict[str, float]
    disagreement: dict[str, float]
    reason: str
    copy_share: dict[str, float] | None = None
    copy_strength: float = 1.0

    @property
    def copy_serves(self) -> bool:
        """Whether the copied LoRA does no worse, and enough to be worth writing."""
        return (
            self.decision == COPY
            and self.copy_share is not None
            and min(self.copy_share[origin] for origin in ("adapted", "target")) >= MIN_SHARE
        )


def judge_updates(
    target: nn.Module,
    updates: Mapping[str, LowRank],
    held_out: Sequence[WantedChange],
    read: Callable[[Any], Tensor] = output_of,
    copied: Mapping[str, LowRank] | None = None,
) -> Gate:
    """Chooses the strength, and go, weaken, copy or refuse.

    Args:
        target: the target without updates.
        updates: what the fit found.
        held_out: probes of every origin that the fit did not see.
        read: return value of the target -> its prediction.
        copied: the source's LoRA, to be compared where it fits the target's modules.
    """
    strength, share = _best_strength(target, updates, held_out, read)
    disagreement = _energy_ratio(held_out, lambda wanted: wanted.apart)
    copy_share, copy_strength = None, 1.0
    if copied and fits_target(target, copied):
        copy_strength, copy_share = _best_strength(target, copied, held_out, read)
    decision, reason = decide_gate(strength, share, disagreement, copy_share)
    return Gate(decision, strength, share, disagreement, reason, copy_share, copy_strength)


def decide_gate(
    strength: float,
    share: dict[str, float],
    disagreement: dict[str, float],
    copy_share: dict[str, float] | None,
) -> tuple[str, str]:
    """The decision and its reason."""
    # The target's own trajectories and the LoRA's both count: a fit that serves only one of them
    # would bend what the LoRA never meant to touch, or miss what it is for.
    worst = min(share[origin] for origin in ("adapted", "target"))
    # Judged where the LoRA leads and where the target itself goes.
    apart = max(disagreement[origin] for origin in ("adapted", "target"))
    copied = copy_share["all"] if copy_share else float("-inf")
    # A copy that serves does what the LoRA does off the probes as well, a fit knows the probes
    # only: it is taken only where the bases agree and the source's wish can be trusted.
    kept = copied >= COPY_SERVES and apart > MAX_START
    if apart > MAX_DISAGREEMENT and not kept:
        return REFUSE, (
            f"the bases' own predictions differ by {apart:.2g} times the LoRA's change, so the "
            "source cannot say what this LoRA should do here; use --method auto or copy"
        )
    if kept or copied >= share["all"]:
        return COPY, (
            f"the LoRA moved without probing reaches {copied:.0%} of the wanted change on held-out "
            f"probes, the fitted one {share['all']:.0%}; the bases differ by {apart:.2g} times it"
        )
    if worst < MIN_SHARE:
        return REFUSE, (
            f"only {worst:.0%} of the wanted change was reached on held-out probes "
            f"(at least {MIN_SHARE:.0%} is asked for); a larger rank or more probes may help"
        )
    reason = f"{share['all']:.0%} of the wanted change reached on held-out probes"
    return (GO if strength == 1.0 else WEAKEN), reason


def copy_is_start(
    target: nn.Module,
    copied: Mapping[str, LowRank],
    probes: Sequence[WantedChange],
    read: Callable[[Any], Tensor],
) -> bool:
    """Whether copied updates are a start for the fit: the bases agree, and the copy does its work.

    Args:
        target: the target without updates.
        copied: of some of its modules.
        probes: some that the fit may use.
        read: return value of the target -> its prediction.
    """
    if not copied or not fits_target(target, copied):
        return False
    if _energy_ratio(probes, lambda wanted: wanted.apart)["all"] > MAX_START:
        return False
    return _share_achieved(target, copied, probes, 1.0, read)["all"] >= COPY_SERVES


def fits_target(target: nn.Module, updates: Mapping[str, LowRank]) -> bool:
    """Whether the target has every module of the updates, in their shapes."""
    modules = dict(target.named_modules())
    for name, update in updates.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.flatten(1).shape != update.shape:
            return False
    return True


def _best_strength(
    target: nn.Module,
    updates: Mapping[str, LowRank],
    held_out: Sequence[WantedChange],
    read: Callable[[Any], Tensor],
) -> tuple[float, dict[str, float]]:
    """The one of STRENGTHS with the largest share over all probes, and its shares."""
    best: tuple[float, dict[str, float]] | None = None
    for strength in reversed(STRENGTHS):
        share = _share_achieved(target, updates, held_out, strength, read)
        if best is not None and share["all"] <= best[1]["all"]:
            break  # the error is close to a parabola of the strength: weaker is worse still
        best = strength, share
    assert best is not None
    return best


def _share_achieved(
    target: nn.Module,
    updates: Mapping[str, LowRank],
    held_out: Sequence[WantedChange],
    strength: float,
    read: Callable[[Any], Tensor],
) -> dict[str, float]:
    """Share of the wanted change achieved, by origin and for all."""
    with apply_updates(target, updates, strength):
        missing = [predict_call(target, w.call, read) - w.plain - w.change for w in held_out]
    lost = dict(zip(map(id, held_out), missing, strict=True))
    ratio = _energy_ratio(held_out, lambda wanted: lost[id(wanted)])
    return {origin: 1 - value for origin, value in ratio.items()}


def _energy_ratio(
    held_out: Sequence[WantedChange], part: Callable[[WantedChange], Tensor]
) -> dict[str, float]:
    """Σ‖part‖²/Σ‖wanted change‖² by origin, and over all."""
    found = {}
    for origin in (*dict.fromkeys(w.call.origin for w in held_out), "all"):
        chosen = [w for w in held_out if origin in (w.call.origin, "all")]
        top = torch.stack([part(w).double().square().sum() for w in chosen]).sum()
        bottom = torch.stack([w.change.double().square().sum() for w in chosen]).sum()
        found[origin] = float(top / bottom.clamp_min(1e-30))
    return found
