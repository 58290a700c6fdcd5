"""The verdict on a fitted LoRA, from images outside the fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.lowrank import LowRank
from .probes import Asking, Probe
from .sides import FitSide
from .updates import with_lora

GO, WEAKEN, COPY, REFUSE = "go", "weaken", "copy", "refuse"
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
"""The factors that are tried."""
MIN_SHARE = 0.25
"""Least share of the wanted change that an update must reach."""
MAX_DISAGREEMENT = 0.4
"""Disagreement above which the source cannot say what the target should do."""
MIN_IMAGE_SHARE = 0.1
"""The same on the LoRA's images where the models were asked about images: half of such a fit
follows pairs of images, which are not among the held-out questions, and a LoRA is worth more than
this share says (docs/results.md)."""
IMAGE_DOUBT = 0.09
"""Share of the wanted change by which a weaker strength must be better there. Noise that the target
does not see makes weaker ones look better than they are (docs/results.md)."""
RAISED = 1.25
"""Strength of a fit from nothing. Least squares on what another model does give too weak a change
(docs/results.md)."""
OTHER_LOOK = 1.0
"""Disagreement of bases that draw different images: above it more of the change does harm."""
DOUBT = 1.0
"""Error of the wanted change that is expected for a disagreement of 1, as a share of its energy."""
SURE = 1.645
"""Standard errors between a gain and a sure one (95 %, one-sided)."""
_OF = {"adapted": "of the LoRA", "target": "of the target"}


@dataclass(frozen=True)
class Gain:
    """How much more of the wanted change a fit reaches.

    More than the copy, or than no update.
    """

    share: float  # of the wanted change
    error: float  # its standard error over the held-out images; infinite for a single one
    images: int  # how many there are

    @property
    def lowest(self) -> float:
        """What the gain is at least, with 95 % certainty."""
        return self.share - SURE * self.error


@dataclass(frozen=True)
class Gate:
    """The verdict of the held-out probes."""

    # "go", "weaken", "copy" where the fit gains nothing sure over the rival (the copied LoRA) on
    # the same probes, or "refuse"
    decision: str
    # The factor of every update: the one of STRENGTHS with the largest share, where that is surely
    # better than 1, or RAISED.
    strength: float
    # Origin -> 1 − Σ‖achieved − wanted‖²/Σ‖wanted‖² of the change of the prediction, at the one of
    # STRENGTHS. 1 is perfect, 0 as good as no LoRA.
    share: dict[str, float]
    # Origin -> how far the bases' own predictions are apart, whatever the LoRA is; see
    # `measure_disagreement`. 0 is the same base; two unrelated functions have about 2.
    disagreement: dict[str, float]
    reason: str  # one sentence
    # `share` of the rival at its best strength; None where it does not fit the target
    copy_share: dict[str, float] | None = None
    copy_strength: float = 1.0  # the one of STRENGTHS that is best for the rival
    gain: Gain | None = None  # of the fit over the rival; None without a rival
    # Of the fit over no update, where the models were asked about images; else None
    effect: Gain | None = None

    @property
    def copy_serves(self) -> bool:
        """Whether the copy does no worse, and reaches enough of the change to be written."""
        if self.decision != COPY or self.copy_share is None:
            return False
        if self.effect is not None:
            return self.copy_share["adapted"] >= MIN_IMAGE_SHARE and self.copy_share["target"] >= 0
        return min(self.copy_share[origin] for origin in ("adapted", "target")) >= MIN_SHARE


def judge_fit(
    asking: Asking,
    updates: Mapping[str, LowRank],  # the fitted ones, of the target
    copied: Mapping[str, LowRank],  # the rival's, compared where they fit the target's modules
    held_out: Sequence[Probe],  # of all origins, which the fit did not see
    start: str = "zero",  # where the fit started, "zero" or "copy"
) -> Gate:
    """Chooses the strength and the decision.

    Of what the bases predict differently the share `look` is wanted, and the rest may be an error.
    """
    target = asking.target
    disagreement = measure_disagreement(held_out)
    unwanted = {origin: (1 - asking.look) * value for origin, value in disagreement.items()}
    doubt = IMAGE_DOUBT if asking.pairs else least_gain(unwanted["all"], "zero")
    strength, missing = _best_strength(target, updates, held_out, doubt)
    share = share_by_origin(held_out, missing)
    copy_share, copy_strength, gain = None, 1.0, None
    if copied and fits_target(target.denoiser, copied):
        copy_strength, copy_missing = _best_strength(target, copied, held_out, doubt)
        copy_share = share_by_origin(held_out, copy_missing)
        gain = _measure_gain(held_out, missing, copy_missing)
    least = least_gain(unwanted["all"], "copy" if asking.pairs else start)
    if asking.guidance != 1 or not asking.shared:
        least = 0.0
    effect = None
    if asking.pairs:
        effect = _measure_gain(held_out, missing, [energy_of(p.change) for p in held_out])
    # Noise of its own for either model makes most of what their predictions differ by.
    compared = unwanted if asking.shared else dict.fromkeys(unwanted, 0.0)
    decision, reason = decide_gate(strength, share, compared, copy_share, gain, least, effect)
    if start == "zero" and decision == GO and disagreement["all"] <= OTHER_LOOK:
        strength = RAISED
    return Gate(
        decision, strength, share, disagreement, reason, copy_share, copy_strength, gain, effect
    )


def decide_gate(
    strength: float,
    share: Mapping[str, float],
    disagreement: Mapping[str, float],
    copy_share: Mapping[str, float] | None,
    gain: Gain | None,
    least: float,
    effect: Gain | None = None,
) -> tuple[str, str]:
    """Returns the decision and its reason; arguments are fields of `Gate`.

    `least` is the gain over the copy that must surely be exceeded. With an `effect`, that of pairs
    of images, it must be sure that anything of the change was reached.
    """
    # The target's own images and the LoRA's both count: a fit that serves only one of them would
    # change images that the LoRA does not concern, or miss those that it does.
    difference = max(disagreement[origin] for origin in ("adapted", "target"))
    copied = copy_share["all"] if copy_share else -math.inf
    if effect is not None and effect.share == 0 and effect.error == 0:
        return REFUSE, "the LoRA changes nothing that the models' predictions show"
    if difference > MAX_DISAGREEMENT and copied < MIN_SHARE:
        return REFUSE, (
            "the bases' own predictions differ by too much for the source to say what this LoRA "
            f"should do on the target (disagreement {difference:.2g}, at most "
            f"{MAX_DISAGREEMENT:g}); move it by weights, or copy it"
        )
    if gain is not None and gain.lowest <= least:
        return COPY, _explain_copy(share["all"], copied, gain, disagreement["all"], least)
    more = "more images or a larger rank may help"
    least_share = MIN_SHARE if effect is None else MIN_IMAGE_SHARE
    for origin, bound in (("adapted", least_share), ("target", MIN_SHARE if not effect else 0.0)):
        if share[origin] < bound:
            return REFUSE, (
                f"only {share[origin]:.0%} of the wanted change was reached on held-out images "
                f"{_OF[origin]} (at least {bound:.0%} is required); {more}"
            )
    if effect is not None and effect.lowest <= 0:
        return REFUSE, (
            f"only {effect.share:.0%} ± {SURE * effect.error:.0%} of the wanted change was reached "
            f"on held-out images, which may be chance ({effect.images} samplings); {more}"
        )
    reason = f"{share['all']:.0%} of the wanted change reached on held-out images"
    if gain is not None:
        reason += (
            f", {copied:.0%} by the LoRA moved by weights alone (a gain of {gain.share:.1%} "
            f"± {SURE * gain.error:.1%} over {gain.images} images)"
        )
    return (GO if strength == 1.0 else WEAKEN), reason


def least_gain(disagreement: float, start: str) -> float:
    """Returns the share of the wanted change that a fit must gain over the copy.

    Where the bases disagree, the wanted change is itself wrong by about DOUBT·disagreement of its
    energy. A fit from zero follows that error, and the copy does not; so the fit seems better by
    that much than it is, and the copy worse. A fit from the copy was shrunk for this already, but
    by an error that was taken for independent of the copy's: it must exceed the error once.
    """
    return (2 if start == "zero" else 1) * DOUBT * disagreement


def _explain_copy(
    fitted: float, copied: float, gain: Gain, disagreement: float, least: float
) -> str:
    if gain.share == 0:
        return (
            f"the LoRA moved by weights alone reaches {copied:.0%} of the wanted change on "
            "held-out images, and nothing was fitted"
        )
    reason = (
        f"the LoRA moved by weights alone reaches {copied:.0%} of the wanted change on held-out "
        f"images, the fitted one {fitted:.0%}"
    )
    if gain.lowest <= 0:
        return f"{reason}; that is not a sure gain over {gain.images} images"
    return (
        f"{reason}; that gain is smaller than the error of the wanted change itself, because the "
        f"bases' own predictions differ (disagreement {disagreement:.2g}: a gain of {least:.0%} "
        "would be needed)"
    )


def fits_target(target: nn.Module, updates: Mapping[str, LowRank]) -> bool:
    """Returns whether the target has weights of fitting shapes for all updates."""
    return len(fitting_updates(target, updates)) == len(updates)


def fitting_updates(target: nn.Module, updates: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Returns the updates that fit a weight of the target."""
    modules = dict(target.named_modules())
    fitting = {}
    for name, update in updates.items():
        weight = getattr(modules.get(name), "weight", None)
        if isinstance(weight, Tensor) and weight.flatten(1).shape == update.shape:
            fitting[name] = update
    return fitting


def measure_missing(
    target: FitSide, updates: Mapping[str, LowRank], probes: Sequence[Probe], strength: float = 1.0
) -> list[Tensor]:
    """Measures ‖achieved − wanted change‖² of every sample [n], batch by batch."""
    with with_lora(target.denoiser, updates, strength):
        reached = [target.predict(p.target, p.level, p.prompts).cpu() for p in probes]
    return [energy_of(r - p.plain - p.change) for r, p in zip(reached, probes, strict=True)]


def _best_strength(
    target: FitSide, updates: Mapping[str, LowRank], held_out: Sequence[Probe], doubt: float
) -> tuple[float, list[Tensor]]:
    """Returns the one of STRENGTHS with the largest share, and what it misses.

    It is 1 unless a weaker one reaches more by `doubt`, a share of the wanted change.
    """
    energy = sum(float(energy_of(probe.change).sum()) for probe in held_out)
    full = measure_missing(target, updates, held_out)
    best, least = (1.0, full), sum(float(part.sum()) for part in full)
    bound = least - doubt * energy
    for strength in sorted(STRENGTHS, reverse=True)[1:]:
        missing = measure_missing(target, updates, held_out, strength)
        total = sum(float(part.sum()) for part in missing)
        if total >= least:
            break  # the error is nearly a parabola of the strength: weaker ones are worse still
        best, least = (strength, missing), total
    return best if least < bound else (1.0, full)


def _measure_gain(
    held_out: Sequence[Probe], missing: list[Tensor], copy_missing: list[Tensor]
) -> Gain:
    """Measures the gain over the copy and its standard error over images.

    The gain is a ratio of sums.
    """
    better = sum_by_image(held_out, [b - a for a, b in zip(missing, copy_missing, strict=True)])
    total = sum_by_image(held_out, [energy_of(probe.change) for probe in held_out])
    energy, count = max(float(total.sum()), 1e-30), len(total)
    share = float(better.sum()) / energy
    if count < 2:
        return Gain(share, math.inf, count)
    squares = float((better - share * total).square().sum())
    return Gain(share, math.sqrt(count / (count - 1) * squares) / energy, count)


def energy_of(part: Tensor) -> Tensor:
    """Computes ‖part‖² of every sample: [n, …] -> [n], in float64 on the CPU."""
    return part.detach().double().flatten(1).square().sum(1).cpu()


def share_by_origin(probes: Sequence[Probe], missing: Sequence[Tensor]) -> dict[str, float]:
    """Computes 1 − Σ‖achieved − wanted‖²/Σ‖wanted‖² by origin, and over all.

    `probes` are batches of one origin each; `missing` is ‖achieved − wanted change‖² of every
    sample of every batch.
    """
    shares = {}
    for origin in (*dict.fromkeys(probe.origin for probe in probes), "all"):
        top = bottom = 0.0
        for probe, part in zip(probes, missing, strict=True):
            if origin in (probe.origin, "all"):
                top += float(part.sum())
                bottom += float(energy_of(probe.change).sum())
        shares[origin] = 1 - top / max(bottom, 1e-30)
    return shares


def measure_disagreement(probes: Sequence[Probe]) -> dict[str, float]:
    """Measures how far the bases' own predictions are apart, by origin and overall.

    It is the mean over samples of ‖v_t − v_s‖² over the mean of ‖r_t‖² and ‖r_s‖², r what is left
    of a prediction v without its component along the latent. So it does not depend on the LoRA.
    Since predictions of noise, velocity and image turn into each other by adding a multiple of the
    latent and scaling, it is the same number for all of them. 0 means the same predictions, 2
    predictions that have nothing in common.
    """
    rows: dict[str, list[Tensor]] = {}
    for probe in probes:
        ratio = _disagree_by_sample(probe)
        for origin in (probe.origin, "all"):
            rows.setdefault(origin, []).append(ratio)
    return {origin: float(torch.cat(parts).mean()) for origin, parts in rows.items()}


def _disagree_by_sample(probe: Probe) -> Tensor:
    """Divides ‖v_t − v_s‖² by the two predictions' mean energy beside the latent [n]."""
    latent = probe.target
    own, other = probe.plain, probe.plain - probe.difference
    energies = [_energy_beside(prediction, latent) for prediction in (own, other)]
    return energy_of(probe.difference) / ((energies[0] + energies[1]) / 2).clamp_min(1e-30)


def _energy_beside(prediction: Tensor, latent: Tensor) -> Tensor:
    """Returns a prediction's energy without its component along a latent of its shape."""
    if latent.shape != prediction.shape:
        return energy_of(prediction)
    x = latent.detach().double().flatten(1).cpu()
    v = prediction.detach().double().flatten(1).cpu()
    along = (v * x).sum(1) / x.square().sum(1).clamp_min(1e-30)
    return (v - along[:, None] * x).square().sum(1)


def sum_by_image(probes: Sequence[Probe], values: Sequence[Tensor]) -> Tensor:
    """Sums the samples' values over each sampled image [number of images].

    `values` has one for every sample of every probe, [n] each.
    """
    sums: dict[int, float] = {}
    for probe, value in zip(probes, values, strict=True):
        for number, part in zip(probe.numbers, value.tolist(), strict=True):
            sums[number] = sums.get(number, 0.0) + part
    return torch.tensor(list(sums.values()), dtype=torch.float64)
