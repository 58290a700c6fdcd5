"""Whether a probed LoRA should be used: measured on trajectories that it was not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..linalg.lowrank import LowRank
from .trajectories import Call, applied, output_of, predict

GO, WEAKEN, REFUSE = "go", "weaken", "refuse"
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
MIN_SHARE = 0.25
MAX_DISAGREEMENT = 1.0


@dataclass(frozen=True)
class Wanted:
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
        decision: "go", "weaken" or "refuse".
        strength: the factor on every update: the one of STRENGTHS with the largest share.
        share: origin -> 1 − Σ‖achieved − wanted‖²/Σ‖wanted‖² of the change of the prediction, at
            that strength. 1 is perfect, 0 as good as no LoRA.
        disagreement: origin -> Σ‖v_target − v_source‖²/Σ‖wanted‖². Above 1 the bases differ by
            more than the LoRA's own change: what the source wants says little about the target.
        reason: one sentence.
    """

    decision: str
    strength: float
    share: dict[str, float]
    disagreement: dict[str, float]
    reason: str


def judge(
    target: nn.Module, updates: Mapping[str, LowRank], held_out: Sequence[Wanted],
    read: Callable[[Any], Tensor] = output_of,
) -> Gate:  # fmt: skip
    """Chooses the strength, and go, weaken or refuse.

    Args:
        target: the target without updates.
        updates: what the fit found.
        held_out: probes of every origin that the fit did not see.
        read: return value of the target -> its prediction.
    """
    shares = {s: _share(target, updates, held_out, s, read) for s in STRENGTHS}
    strength = max(shares, key=lambda s: shares[s]["all"])
    share = shares[strength]
    disagreement = _ratio(held_out, lambda wanted: wanted.apart)
    # The target's own trajectories and the LoRA's both count: a fit that serves only one of them
    # would bend what the LoRA never meant to touch, or miss what it is for.
    worst = min(share[origin] for origin in ("adapted", "target"))
    # Judged where the LoRA leads and where the target itself goes.
    apart = max(disagreement[origin] for origin in ("adapted", "target"))
    if apart > MAX_DISAGREEMENT:
        reason = (
            f"the bases' own predictions differ by {apart:.2g} times the LoRA's change, so the "
            "source cannot say what this LoRA should do here; use --method auto or copy"
        )
        return Gate(REFUSE, strength, share, disagreement, reason)
    if worst < MIN_SHARE:
        reason = (
            f"only {worst:.0%} of the wanted change was reached on held-out probes "
            f"(at least {MIN_SHARE:.0%} is asked for); a larger rank or more probes may help"
        )
        return Gate(REFUSE, strength, share, disagreement, reason)
    reason = f"{share['all']:.0%} of the wanted change reached on held-out probes"
    decision = GO if strength == 1.0 else WEAKEN
    return Gate(decision, strength, share, disagreement, reason)


def _share(
    target: nn.Module, updates: Mapping[str, LowRank], held_out: Sequence[Wanted], strength: float,
    read: Callable[[Any], Tensor],
) -> dict[str, float]:  # fmt: skip
    """Share of the wanted change achieved, by origin and for all."""
    with applied(target, updates, strength):
        missing = [predict(target, w.call, read) - w.plain - w.change for w in held_out]
    lost = dict(zip(map(id, held_out), missing, strict=True))
    ratio = _ratio(held_out, lambda wanted: lost[id(wanted)])
    return {origin: 1 - value for origin, value in ratio.items()}


def _ratio(held_out: Sequence[Wanted], part: Callable[[Wanted], Tensor]) -> dict[str, float]:
    """Σ‖part‖²/Σ‖wanted change‖² by origin, and over all."""
    found = {}
    for origin in (*dict.fromkeys(w.call.origin for w in held_out), "all"):
        chosen = [w for w in held_out if origin in (w.call.origin, "all")]
        top = torch.stack([part(w).double().square().sum() for w in chosen]).sum()
        bottom = torch.stack([w.change.double().square().sum() for w in chosen]).sum()
        found[origin] = float(top / bottom.clamp_min(1e-30))
    return found
