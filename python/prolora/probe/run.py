"""Probing, read from top to bottom: record, fit, judge."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .. import adapters
from ..adapters.adapter import Adapter
from ..core.lowrank import LowRank
from ..errors import ProLoRAError, UnrelatedBases
from ..version import __version__
from . import blockwise, checkpoint, gate, joint_fit
from .batches import count_samples, mix_samples
from .blocks import find_blocks
from .checkpoint import Checkpoints
from .linearisation import ProbeBatch
from .precision import HALVES, in_float32
from .recording import Recorder, spill_questions
from .report import BlockReport, ProbeReport
from .settings import FitSettings
from .spill import SpillStore
from .trajectories import Sample, apply_updates, output_of, weight_of
from .translation import Convert, Question, Read, Translate, Translation, same_call, same_prediction

ORIGINS = ("source", "adapted", "target")
CALLS_AT_ONCE = 16
"""Calls replayed between two changes of the source's weights."""
BATCHES_TO_TRY_COPY = 4
"""Batches on which it is found out whether copied updates serve as a start."""

__all__ = ["BlockReport", "FitSettings", "ProbeReport", "ProbeTransfer", "fit_lora"]


@dataclass(frozen=True)
class ProbeTransfer:
    """A probed LoRA, strength applied, and its account."""

    adapter: Adapter
    report: ProbeReport

    def save(
        self, path: str | PathLike[str], *, format: str = "auto", dtype: torch.dtype | None = None
    ) -> None:
        """Writes the LoRA whole or not at all; arguments as in `prolora.Transfer.save`."""
        adapters.write_adapter(self.adapter, path, format=format, dtype=dtype)


def fit_lora(
    source: nn.Module,
    target: nn.Module,
    lora: str | PathLike[str] | Adapter | Mapping[str, LowRank],
    sample_source: Sample,
    sample_target: Sample,
    sample_adapted: Sample | None = None,
    *,
    translate: Translate | None = None,
    translate_back: Translate | None = None,
    convert: Convert | None = None,
    read: Read | None = None,
    rival: Mapping[str, LowRank] | None = None,
    **options: Any,
) -> ProbeTransfer:
    """Fits the LoRA that makes `target` change as the LoRA makes `source` change.

    Both models are run on trajectories that they sample themselves from noise: no data. Wanted of
    the target is v_t + (v_s with LoRA − v_s) at every probe. The linear modules of its blocks are
    fitted to that by a few Gauss–Newton steps on all of them at once (strategy "joint"), or block
    by block to r_t + (r_s with LoRA − r_s)·T, T a ridge map between the residual streams of the
    two bases (strategy "blocks"; the last block is fitted to the prediction).

    Args:
        source: the module that LoRA names start from (a pipeline's unet or transformer), stored
            in float32, float16 or bfloat16; computed in float32.
        target: the same of the target; widths and depths may differ. Both must take the same
            inputs and predict the same quantity, unless the four functions below translate.
        lora: a file, an adapter, or updates by the source's module names.
        sample_source: runs the source's sampler from noise with the given seed.
        sample_target: the same for the target.
        sample_adapted: runs the source while the LoRA is in its weights, where that is done in
            another way than `sample_source` (few steps, no guidance, a trigger word).
        translate: turns a call recorded on the source into the call that asks the target the same
            question (its own text embeddings, its own notion of time); None: the same call.
        translate_back: turns a call recorded on the target into that of the source.
        convert: (call of the source, its prediction) -> the prediction in the target's terms.
        read: return value of either model -> its prediction; None: see `output_of`.
        rival: updates of the target to compare with on the held-out probes; None: the LoRA's own.
        options: the fields of `FitSettings`.

    Raises:
        UnrelatedBases: the gate refuses, and `force` is not set.
        ProLoRAError: a module, block or dtype that probing does not know, named in the message.

    Returns:
        The target's adapter and the report. The models' weights are afterwards as before.
    """
    chosen = FitSettings(**options)
    between = Translation(
        translate or same_call,
        translate_back or same_call,
        convert or same_prediction,
        read or output_of,
    )
    adapter = _as_adapter(lora)
    _check_models(source, target, adapter)
    frozen = [(p, p.requires_grad) for m in (source, target) for p in m.parameters()]
    modes = source.training, target.training
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        source.eval(), target.eval()
        samplers = (sample_source, sample_adapted or sample_source, sample_target)
        compared = adapter.updates if rival is None else rival
        with in_float32(source), in_float32(target):
            return _record_fit_judge(source, target, adapter, samplers, between, compared, chosen)
    finally:
        source.train(modes[0]), target.train(modes[1])
        for parameter, needed in frozen:
            parameter.requires_grad_(needed)


def _record_fit_judge(
    source: nn.Module,
    target: nn.Module,
    adapter: Adapter,
    samplers: tuple[Sample, Sample, Sample],
    between: Translation,
    rival: Mapping[str, LowRank],
    options: FitSettings,
) -> ProbeTransfer:
    clock = time.perf_counter
    started = clock()
    keep = Checkpoints(options.resume)
    recorder = Recorder(source, target, adapter, samplers, between, keep, options.samplers)
    quarter = None if options.max_memory is None else options.max_memory // 4
    calls = spill_questions(recorder.questions(options.seed), quarter)
    held_out = spill_questions(recorder.questions(options.seed + 3), quarter)
    report = ProbeReport(len(calls), len(held_out), options.rank)
    report.seconds["sample"] = clock() - started

    started = clock()
    if options.strategy == "joint":
        options = options.sized(_count_samples(calls) + _count_samples(held_out))
        calls, held_out = _draw_samples(source, target, calls, held_out, between, options)
        calls, held_out = spill_questions(calls, quarter), spill_questions(held_out, quarter)
    report.samples = (_count_samples(calls), _count_samples(held_out))
    theirs, ours = find_blocks(source, calls[0].source), find_blocks(target, calls[0].target)
    places = _choose_modules(source, target, ours, theirs, adapter, report)
    report.modules = sum(len(found) for found in places.values())
    report.seconds["draw"] = clock() - started

    started = clock()
    total = options.steps if options.strategy == "joint" else len(places)

    def told(done: int, name: str) -> None:
        if options.progress:
            options.progress(done, total, name)

    if options.strategy == "joint":
        updates = _fit_jointly(
            source,
            target,
            adapter,
            calls,
            places,
            between,
            rival,
            options,
            report,
            keep,
            recorder.key,
            told,
        )
    else:
        updates = blockwise.fit_blocks(
            source,
            target,
            adapter,
            calls,
            theirs,
            places,
            between,
            options,
            report,
            keep,
            recorder.key,
            told,
        )
    for name in updates:
        report.left_out.pop(name, None)
    report.seconds["fit"] = clock() - started

    started = clock()
    verdict = gate.judge_updates(
        target,
        updates,
        list(_wanted_changes(source, target, adapter, held_out, between)),
        between.read,
        copied=rival,
    )
    report.gate = verdict
    report.seconds["judge"] = clock() - started
    told(total, "judged")
    if verdict.decision == gate.REFUSE and not options.force:
        raise UnrelatedBases(f"probing refuses this transfer: {verdict.reason}")
    moved = {n: LowRank(u.up * verdict.strength, u.down) for n, u in updates.items()}
    facts = {"prolora.version": __version__, "prolora.method": "probe"}
    new = Adapter(moved, format=adapter.format, dtype=adapter.dtype, metadata=facts)
    return ProbeTransfer(new, report)


def _as_adapter(lora: str | PathLike[str] | Adapter | Mapping[str, LowRank]) -> Adapter:
    if isinstance(lora, Adapter):
        return lora
    if isinstance(lora, str | PathLike):
        return adapters.read_adapter(lora)
    return Adapter(dict(lora), format="diffusers")


def _check_models(source: nn.Module, target: nn.Module, adapter: Adapter) -> None:
    """Refuses before anything is sampled."""
    if not adapter.updates:
        raise ProLoRAError("the LoRA has no updates")
    for side, model in (("source", source), ("target", target)):
        for name, parameter in model.named_parameters():
            if parameter.dtype not in (torch.float32, *HALVES):
                raise ProLoRAError(
                    f"{name} of the {side} is {parameter.dtype}: probing computes in float32 from "
                    "weights of float32, float16 or bfloat16; call .float() on the model"
                )
    for name in adapter.updates:
        weight_of(source, name, convolution=True)


def _choose_modules(
    source: nn.Module,
    target: nn.Module,
    ours: Sequence[str],
    theirs: Sequence[str],
    adapter: Adapter,
    report: ProbeReport,
) -> dict[str, list[str]]:
    """Target block -> its linear modules whose role the LoRA adapts in some block of the source.

    Between architectures roles mean nothing: then every linear module of a block is taken, but for
    those that modulate norms.
    """
    roles = set()
    for name in adapter.updates:
        block = next((b for b in theirs if name.startswith(f"{b}.")), None)
        if block is None:
            report.left_out[name] = "it lies in no block; the fit makes up for it in the blocks"
        else:
            roles.add(name.removeprefix(f"{block}."))
    known = {type(source.get_submodule(block)).__name__ for block in theirs}
    alike = any(type(target.get_submodule(block)).__name__ in known for block in ours)
    places: dict[str, list[str]] = {}
    for block in ours:
        inside = target.get_submodule(block).named_modules()
        linear = [name for name, module in inside if isinstance(module, nn.Linear)]
        found = [n for n in linear if (n in roles if alike else "norm" not in n)]
        if found:
            places[block] = found
    if not places:
        raise ProLoRAError("no block of the target has a module that the LoRA adapts")
    return places


def _draw_samples(
    source: nn.Module,
    target: nn.Module,
    calls: Sequence[Question],
    held_out: Sequence[Question],
    between: Translation,
    options: FitSettings,
) -> tuple[list[Question], list[Question]]:
    """Samples to fit on and to judge on, in batches that mix many moments."""
    generator = torch.Generator().manual_seed(options.seed)
    assert options.probes and options.held_out and options.batch

    def both(question: Question) -> tuple[Tensor, Tensor]:
        return between.of_source(source, question), between.of_target(target, question)

    judged = []
    for origin in ORIGINS:  # apart, since the gate looks at each
        own = [question for question in held_out if question.origin == origin]
        limit = max(options.held_out // len(ORIGINS), 1)
        judged += mix_samples(own, limit, limit, both, generator)
    return mix_samples(calls, options.probes, options.batch, both, generator), judged


def _fit_jointly(
    source: nn.Module,
    target: nn.Module,
    adapter: Adapter,
    calls: Sequence[Question],
    places: dict[str, list[str]],
    between: Translation,
    rival: Mapping[str, LowRank],
    options: FitSettings,
    report: ProbeReport,
    keep: Checkpoints,
    made_of: str,
    told: Callable[[int, str], None],
) -> dict[str, LowRank]:
    """All updates at once, at the rank asked for; from the copied ones where these serve."""
    key = (
        ""
        if keep.folder is None
        else checkpoint.hash_texts(made_of, options.told(), checkpoint.hash_updates(rival))
    )
    kept = keep.fitted("joint", key)
    if kept is not None:
        updates, facts = kept
        report.steps, report.start, report.resumed = facts["steps"], facts["start"], 1
        return updates
    shelf = SpillStore(None if options.max_memory is None else options.max_memory // 2)
    sizes, first = [], []
    for i, found in enumerate(_wanted_changes(source, target, adapter, calls, between)):
        first += [found] if i < BATCHES_TO_TRY_COPY else []
        if options.progress:
            options.progress(i, len(calls), "asking")
        shelf.put(i, (found.plain, found.plain + found.change))
        sizes.append(len(found.plain))
    queue: list[int] = []
    least = options.batch or 1

    def draw() -> list[ProbeBatch]:
        """The batches of one step: every probe comes once before any comes again."""
        chosen: list[int] = []
        while sum(sizes[i] for i in chosen) < least:
            if not queue:
                queue.extend(range(len(calls)))
            chosen.append(queue.pop(0))
        return [ProbeBatch(calls[i].target, *shelf.get(i)) for i in chosen]

    names = [f"{block}.{role}" for block, modules in places.items() for role in modules]
    start = dict(rival) if gate.copy_is_start(target, rival, first, between.read) else {}
    report.start = "copy" if start else "zero"
    halfway = keep.halfway("fit", key)
    outside = {name: start.pop(name) for name in list(start) if name not in names}
    with apply_updates(target, outside):  # copied and left so: what is fitted goes on from there
        problem = joint_fit.JointProblem(
            target, names, between.read, draw, options.steps, options.damping
        )
        fitted = joint_fit.fit_jointly(
            problem, start, lambda step: told(step, f"step {step + 1}"), halfway
        )
    report.steps = fitted.history
    updates = joint_fit.cut_updates(fitted, options.rank) | outside
    facts = {"steps": fitted.history, "start": report.start}
    keep.keep_fitted("joint", key, updates, facts)
    if halfway:
        halfway.drop()
    return updates


def _count_samples(questions: Sequence[Question]) -> int:
    return sum(count_samples(question.source) for question in questions)


@torch.no_grad()
def _wanted_changes(
    source: nn.Module,
    target: nn.Module,
    adapter: Adapter,
    questions: Sequence[Question],
    between: Translation,
) -> Iterator[gate.WantedChange]:
    """What the target should do at each call."""
    for start in range(0, len(questions), CALLS_AT_ONCE):
        some = questions[start : start + CALLS_AT_ONCE]
        before = [between.of_source(source, question) for question in some]
        with apply_updates(source, adapter.updates):
            after = [between.of_source(source, question) for question in some]
        for question, v, w in zip(some, before, after, strict=True):
            plain = between.of_target(target, question)
            yield gate.WantedChange(question.target, plain, w - v, plain - v)
