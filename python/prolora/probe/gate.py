"""Whether a probed LoRA should be used, measured on trajectories that the fit did not see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.lowrank import LowRank
from .recording.trajectories import output_of, predict_call
from .recording.wanted import WantedChange
from .updates import apply_updates

GO, WEAKEN, COPY, REFUSE = "go", "weaken", "copy", "refuse"
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
"""The factors that are tried."""
MIN_SHARE = 0.25
"""Least share of the wanted change that an update must reach."""
MAX_DISAGREEMENT = 3.0
"""Disagreement above which the source cannot say what the target should do."""
COPY_SERVES = 0.5
"""Least share that a copy reaches between related bases."""
MAX_START = 0.35
"""Disagreement up to which a fit improves a copy that reaches COPY_SERVES; above, it harms it."""


@dataclass(frozen=True)
class Gate:
    """The verdict of the held-out probes.

    Attributes:
        decision: "go", "weaken", "copy" where the rival (the copied LoRA) does no worse on the same
            probes, or "refuse".
        strength: the factor of every update: the one of STRENGTHS with the largest share.
        share: origin -> 1 − Σ‖achieved − wanted‖²/Σ‖wanted‖² of the change of the prediction, at
            that strength. 1 is perfect, 0 as good as no LoRA.
        disagreement: origin -> Σ‖v_target − v_source‖²/Σ‖wanted‖². Where the bases differ by much
            more than the change of the LoRA, the source says little about the target.
        reason: one sentence.
        copy_share: the same as `share`, for the rival at its best strength; None where its modules
            or shapes are not the target's.
        copy_strength: the one of STRENGTHS that is best for the rival.
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
        """Whether the copy does no worse, and reaches enough of the change to be written."""
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
    """Chooses the strength and the decision.

    Args:
        target: the target without updates.
        updates: the fitted ones.
        held_out: probes of all origins that the fit did not see.
        read: return value of the target -> its prediction.
        copied: the rival, compared where it fits the target's modules.
    """
    strength, share = _best_strength(target, updates, held_out, read)
    disagreement = _energy_ratio(held_out, lambda wanted: wanted.base_difference)
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
    """The decision and its reason; arguments as in `Gate`."""
    # The target's own trajectories and the LoRA's both count: a fit that serves only one of them
    # would change images that the LoRA does not concern, or miss those that it does.
    worst = min(share[origin] for origin in ("adapted", "target"))
    difference = max(disagreement[origin] for origin in ("adapted", "target"))
    copied = copy_share["all"] if copy_share else float("-inf")
    # A copy that serves also acts as the LoRA does away from the probes; a fit knows the probes
    # only. So the fit is preferred only where the bases agree on what the change should be.
    keeps_copy = copied >= COPY_SERVES and difference > MAX_START
    if difference > MAX_DISAGREEMENT and not keeps_copy:
        return REFUSE, (
            f"the bases' own predictions differ by {difference:.2g} times the change of the "
            "LoRA, so the source does not determine what this LoRA should do on the target; use "
            "--method auto or copy"
        )
    if keeps_copy or copied >= share["all"]:
        return COPY, (
            f"the LoRA moved without probing reaches {copied:.0%} of the wanted change on held-out "
            f"probes, the fitted one {share['all']:.0%}; the bases differ by {difference:.2g} "
            "times that change"
        )
    if worst < MIN_SHARE:
        return REFUSE, (
            f"only {worst:.0%} of the wanted change was reached on held-out probes "
            f"(at least {MIN_SHARE:.0%} is required); a larger rank or more probes may help"
        )
    reason = f"{share['all']:.0%} of the wanted change reached on held-out probes"
    return (GO if strength == 1.0 else WEAKEN), reason


def copy_is_start(
    target: nn.Module,
    copied: Mapping[str, LowRank],
    probes: Sequence[WantedChange],
    read: Callable[[Any], Tensor],
) -> bool:
    """Whether a fit should start from copied updates: the bases agree, and the copy serves.

    Args:
        target: the target without updates.
        copied: of some of its modules.
        probes: some of those of the fit.
        read: return value of the target -> its prediction.
    """
    if not copied or not fits_target(target, copied):
        return False
    if _energy_ratio(probes, lambda wanted: wanted.base_difference)["all"] > MAX_START:
        return False
    return _share_achieved(target, copied, probes, 1.0, read)["all"] >= COPY_SERVES


def fits_target(target: nn.Module, updates: Mapping[str, LowRank]) -> bool:
    """Whether the target has every module of the updates, with weights of their shapes."""
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
            break  # the error is nearly a parabola of the strength: weaker ones are worse still
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
    ratios = {}
    for origin in (*dict.fromkeys(w.call.origin for w in held_out), "all"):
        chosen = [w for w in held_out if origin in (w.call.origin, "all")]
        top = torch.stack([part(w).double().square().sum() for w in chosen]).sum()
        bottom = torch.stack([w.change.double().square().sum() for w in chosen]).sum()
        ratios[origin] = float(top / bottom.clamp_min(1e-30))
    return ratios
