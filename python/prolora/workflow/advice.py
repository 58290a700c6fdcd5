"""What to do with a LoRA between two bases, in one screen: `advise`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ..bases import Base, BaseLike, vae
from ..bases.cache.basis_cache import BasisCache
from ..comparison.block_matching import resolve_match
from ..comparison.comparison import Comparison, compare
from ..comparison.expectation import CLASSES, Mark, PairClass, classify
from ..comparison.module_map import AUTO_MATCH, Match
from ..comparison.renumbered_blocks import recognise_blocks
from ..core.precision import in_full_precision
from ..core.verdict import Verdict, judge_pairs
from ..errors import InvalidOption
from ..files.jsontext import replace_nonfinite
from ..probe.settings import FitSettings
from ..probe.strength import MeasuredStrength, Measurement
from ..probe.workload import write_time
from .advice_options import DEFAULT_ADVICE, AdviceChanges, AdviceOptions
from .base_check import check_bases
from .by_fitting.plan import fitted_modules
from .by_weights.base_pair import BasePair, read_lora
from .in_words import (
    AMOUNTS,
    ZERO,
    InWords,
    judge,
    tell_place,
)
from .lora_fit import LoraFit, StackDrift, describe_stack, locate_lora, measure_plan
from .measuring import (
    TRIAL_STEPS,
    MeasuredSide,
    begin_fit,
    check_runnable,
    measure_lora,
    move_candidates,
    open_models,
)
from .moved_before import tell_moved_before
from .options import BEST, FIT, LoraLike, TransferOptions, name_lora, settle_options, takes_options
from .page.document import Page, Section, render_page
from .table import Table
from .tables import (
    map_pairs,
    tabulate_comparison,
    tabulate_decisions,
    tabulate_measured,
    tabulate_stacks,
    tabulate_sweep,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

Verb = Literal["transfer", "fit", ""]

SAMPLED = FitSettings(images=6, steps=12)
"""What `advise` samples where it measures: six trajectories of each of two models."""


@dataclass(frozen=True)
class Advice:
    """What to do with a LoRA of one base on another, and what it will give.

    Attributes:
        comparison: the two bases, module by module.
        verdict: go or no-go, over the LoRA's modules where there is one.
        expected: what a copy gave on such models.
        lora: where the LoRA lies; None without one.
        measurement: what moved LoRAs reach on the running models; None where it was not asked for.
        fit_seconds: what a whole fit would take here, where the first steps of one were run.
        verb: "transfer" or "fit", what is worth a try; "" where neither is.
        options: its keywords.
    """

    comparison: Comparison
    verdict: Verdict
    expected: PairClass
    lora: LoraFit | None
    measurement: Measurement | None
    fit_seconds: float | None
    verb: Verb
    options: Mapping[str, Any]
    _energies: Mapping[str, float]

    @property
    def measured(self) -> MeasuredStrength | None:
        """The best of what was measured."""
        return (
            None if self.measurement is None else self.measurement.candidates[self.measurement.best]
        )

    @property
    def go(self) -> bool:
        """Whether moving is worth while: measured if it was, otherwise by the weights."""
        return self.verdict.related if self.measured is None else self.measured.go

    def stacks(self) -> list[StackDrift]:
        """Which blocks moved: the drift by depth, a row for each part of the target."""
        groups = self.comparison.places()
        energies = self._energies if self.lora else None
        return [describe_stack(name, modules, energies) for name, modules in groups.items()]

    def tables(self, every_module: bool = False, sweep: bool = False) -> list[Table]:
        """Where blocks came from, drift by depth, overlaps, and what was measured or is expected.

        Args:
            every_module: a row for each module or block, and not for each part.
            sweep: also the overlaps at fewer columns, where overlaps were asked for.
        """
        compared = self.comparison
        title = f"{compared.source} → {compared.target}"
        found = [tabulate_stacks(title, self.stacks(), self.verdict.related)]
        if compared.decisions:
            unused = compared.dropped_blocks
            found.insert(0, tabulate_decisions(compared.decisions, unused, every_module))
        if every_module or compared.sweep:
            found.append(tabulate_comparison(compared, every_module))
        if sweep and compared.sweep:
            found.append(tabulate_sweep(compared))
        if self.measurement is not None:
            found.append(tabulate_measured(self.measurement))
        return found

    def in_words(self) -> InWords:
        """The advice for people: what to expect, what a transfer would do, and what to do next."""
        names = (self.comparison.source, self.comparison.target)
        source, target = (name.removesuffix(".safetensors") for name in names)
        placed = self.lora.kept_energy if self.lora else None
        if self.verdict.size == 0:
            return InWords("⚠", ZERO)
        told = judge(self.verdict, placed, (source, target))
        mark, headline, lines = told.mark, told.headline, [*told.lines]
        lines += [] if placed is None else [tell_place(placed, None, target)]
        if self.measurement is not None:
            mark, headline, lines = self._tell_measured((mark, headline), source, target)
        cautions = tell_moved_before(self.lora.moves if self.lora else ())
        return InWords(mark, headline, tuple(filter(None, lines)), (*cautions,))

    def _tell_measured(
        self, by_weights: tuple[Mark, str], source: str, target: str
    ) -> tuple[Mark, str, list[str]]:
        """Mark, headline and lines where the models were run; arguments as `judge` gives them."""
        assert self.measurement is not None and self.measured is not None
        share = f"{max(0.0, self.measured.share):.0%}"
        (mark, headline), fitted = by_weights, self.measurement.best == FIT
        lines = [
            f"Measured on the running models: {share} of what the LoRA does to {source} arrives on "
            f"{target}. A LoRA that was trained on {target} may do something else."
        ]
        if fitted:
            mark, headline = "✔", f"A fit should work, and do more than weights do on {target}."
            if not self.measured.go:
                mark, headline = "⚠", f"A fit may do a little, and weights do less on {target}."
            lines = [
                f"Measured on the running models: the first steps of a fit bring {share} of what "
                f"the LoRA does to {source} to {target}, and a whole fit should bring no less."
            ]
            if self.fit_seconds is not None:
                lines.append(f"A whole fit takes about {write_time(self.fit_seconds)} here.")
        elif not self.measured.go:
            mark, headline = (
                ("✖" if mark == "✖" else "⚠"),
                f"Expect little: it hardly arrives on {target}.",
            )
        elif not self.verdict.related:
            mark, headline = "⚠", "This may work in part, whatever the weights say."
        return mark, headline, lines

    def sentences(self) -> list[str]:
        """The advice in numbers."""
        sentences = self.comparison.sentences()
        if self.lora is not None:
            sentences.append(self.lora.sentence(self.comparison.verdict.drift))
            if self._differs():
                sentences.append(f"Over the LoRA's modules: {self.verdict.sentence()}")
        if self.measurement is not None:
            return sentences + describe_measurement(self.measurement)
        return sentences

    def _differs(self) -> bool:
        """Whether the LoRA's modules lead to another verdict than all modules."""
        ours, all_of_it = self.verdict, self.comparison.verdict
        return ours.related != all_of_it.related

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        verdict = self.verdict
        fields: dict[str, Any] = {
            "source": self.comparison.source,
            "target": self.comparison.target,
            "match": self.comparison.match,
            "go": self.go,
            "comparison": self.comparison.to_dict(),
            "verdict": asdict(verdict) | {"related": verdict.related},
            "stacks": [asdict(stack) for stack in self.stacks()],
            "renumbered": dict(self.comparison.renumbered),
            "expected": asdict(self.expected),
            "lora": asdict(self.lora) if self.lora else None,
            "measurement": _measurement_dict(self.measurement),
            "fit_seconds": self.fit_seconds,
            "verb": self.verb,
            "options": {n: str(x) if n == "match" else x for n, x in self.options.items()},
            "in_words": str(self.in_words()).split("\n"),
            "summary": self.sentences(),
        }
        plain: dict[str, Any] = replace_nonfinite(fields)
        return plain

    def to_html(self, facts: Mapping[str, str] | None = None) -> str:
        """The advice as one HTML page that needs no other file and no network.

        Args:
            facts: how it was made, by what each is called: the command.
        """
        words = self.in_words()
        tables = self.tables(every_module=True, sweep=True)
        page = Page(
            title=f"{self.comparison.source} → {self.comparison.target}",
            eyebrow="Advice on two models" if self.lora is None else "Advice on a LoRA",
            headline=f"{words.mark} {words.headline}",
            lines=(*words.lines, *words.cautions),
            sentences=self.sentences(),
            map=map_pairs(self.comparison),
            sections=[Section(table.title, [table]) for table in tables],
            facts=facts or {},
        )
        return render_page(page)

    def __str__(self) -> str:
        """The advice in words, then the sentences with the numbers, one a line."""
        return "\n".join([str(self.in_words()), "", *self.sentences()])


_NAMES = {"copy": "the copy", FIT: f"a fit of {TRIAL_STEPS} steps"}


def _measurement_dict(measurement: Measurement | None) -> dict[str, Any] | None:
    if measurement is None:
        return None
    candidates = {
        name: asdict(way) | {"shares": {f"{s:g}": x for s, x in way.shares.items()}, "go": way.go}
        for name, way in measurement.candidates.items()
    }
    return asdict(measurement) | {"candidates": candidates, "best": measurement.best}


def describe_measurement(measurement: Measurement) -> list[str]:
    """What was measured, in plain words.

    Args:
        measurement: of all candidates.
    """
    best, name = measurement.candidates[measurement.best], measurement.best
    go = "Go" if best.go else "No-go"
    strengths = [*best.strength_interval, *(strength for strength, _ in best.by_origin.values())]
    low, high = min(strengths), max(strengths)
    trajectories = {"adapted": "the LoRA's own", "target": "the target's"}
    parts = " and ".join(
        f"{share:.0%} at {strength:.2f} on {trajectories[origin]} trajectories"
        for origin, (strength, share) in best.by_origin.items()
    )
    return [
        f"{go}, measured on {measurement.trajectories} trajectories of the models themselves: "
        f"{_NAMES.get(name, name)} reaches {best.share:.0%} of the wanted change "
        f"at its best strength {best.strength:.2f} ({low:.2f} to {high:.2f}) and "
        f"{best.shares[1.0]:.0%} at 1; {parts}.",
        f"The bases' own predictions differ by {measurement.disagreement:.2g} times that change.",
    ]


@takes_options
@in_full_precision
def advise(
    source: BaseLike,
    target: BaseLike,
    lora: LoraLike | None = None,
    options: AdviceOptions = DEFAULT_ADVICE,
    **changes: Unpack[AdviceChanges],
) -> Advice:
    """Says what to do with a LoRA of one base on another, and what it will give.

    From weights alone: whether the bases are of one lineage, which blocks moved, what share of
    training on the target each method is expected to give (with an interval, from measured pairs of
    small models), and the strength to use. With `measure` both models run on a few trajectories of
    their own, without data or training, and the expectation becomes a measurement.

    Args:
        source: the base that the LoRA was trained on, as `transfer` takes it; a diffusers pipeline
            at hand, too.
        target: the base to move to, in any of these forms.
        lora: the LoRA, as `transfer` takes it; None judges the bases alone.
        options: what is looked at, and with what.
        **changes: options by name, in place of those.

    Returns:
        The advice; `print` shows its sentences.

    Raises:
        InvalidOption: `measure` without a LoRA, or samplers without modules.
        UnsupportedFormat: a base that is no pipeline where it must run, or shares no module.
        ProLoRAError: what `transfer` refuses of the LoRA and the bases.
    """
    options = settle_options(options, changes)
    probe = SAMPLED if isinstance(options.measure, bool) else options.measure
    if options.measure and lora is None:
        raise InvalidOption("measuring needs a LoRA: what is measured is what moving it reaches")
    ours, theirs = MeasuredSide.of(source), MeasuredSide.of(target)
    if options.measure:
        check_runnable(ours, theirs, options.samplers)
    moving, pair = options.as_moved(), (ours.base, theirs.base)
    if lora is not None:
        check_bases(lora, *pair, moving)
    adapter = None if lora is None else read_lora(lora, ours.base)
    comparison, paired = _compare_bases(pair, options, moving)
    verdict, fit = comparison.verdict, None
    energies: dict[str, float] = {}
    if adapter is not None:
        with BasisCache(options.cache).saving() as opened:
            ledger = BasePair(*pair, replace(moving, match=paired), opened).plan(adapter, "outline")
        affinities = measure_plan(ledger.plan, comparison, *pair)
        verdict = judge_pairs(affinities.values()) if affinities else verdict
        verdict = ledger.size_verdict(verdict, affinities)
        fit, energies = locate_lora(ledger, affinities, name_lora(lora))
    measurement, seconds, lost = None, None, False
    if adapter is not None:
        lost = bool(fitted_modules([*ledger.plan.skipped, *ledger.plan.refused], ours.base))
    if options.measure and adapter is not None:
        candidates = move_candidates(adapter, *pair, moving)
        with open_models(ours, theirs, adapter, probe, options.samplers, moving.device) as models:
            if lost or not verdict.related:
                rival = next(iter(candidates.values()))
                candidates[FIT], seconds = begin_fit(models, rival, probe, pair)
            measurement = measure_lora(models, candidates, probe.images, options.progress)
    cut = fit is not None and fit.kept_energy < AMOUNTS[0][0]
    expected = CLASSES[classify(verdict, cut, few_steps=False)]
    chosen = choose_next(pair, options.match, verdict, measurement, probe, lost)
    return Advice(comparison, verdict, expected, fit, measurement, seconds, *chosen, energies)


def _compare_bases(
    pair: tuple[Base, Base], options: AdviceOptions, moving: TransferOptions
) -> tuple[Comparison, Match]:
    """The two bases module by module, and how they are paired."""
    how: dict[str, Any] = {"cache": moving.cache, "device": moving.device}
    how |= {"max_memory": moving.memory_limit, "progress": moving.progress}
    paired = recognise_blocks(resolve_match(options.match, *pair, **how), *pair)
    return compare(*pair, rank=options.overlap, match=paired, **how), paired


def choose_next(
    bases: tuple[Base, Base],
    match: Match,
    verdict: Verdict,
    measurement: Measurement | None,
    probe: FitSettings,
    lost: bool = False,
) -> tuple[Verb, dict[str, Any]]:
    """What is worth a try, and with which options.

    Args:
        bases: source and target.
        match: how modules are paired.
        verdict: by the weights.
        measurement: by the running models, or None.
        probe: says how the target and the LoRA are run.
        lost: whether parts of the LoRA have no place on the target.
    """
    best = None if measurement is None else measurement.candidates[measurement.best]
    paired = {} if match == AUTO_MATCH else {"match": match}
    fits = measurement is not None and measurement.best == FIT
    if best is not None and measurement is not None and best.go and not fits:
        method = {"method": "copy"} if measurement.best == "copy" else {}
        return "transfer", {**method, "strength": round(best.strength, 2), **paired}
    can_fit = vae.can_fit(bases[0].path, bases[1].path)
    if best is None and verdict.related:
        return "transfer", ({"method": BEST} if lost and can_fit else {}) | paired
    if not can_fit:
        return "", {}
    names = ("target_steps", "target_guidance", "lora_steps", "lora_guidance")
    sampling = {name: value for name in names if (value := getattr(probe, name)) is not None}
    return "fit", sampling | paired
