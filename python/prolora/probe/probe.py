"""Probing, read from top to bottom: record, map, fit block after block, judge."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .. import adapters
from ..adapters.adapter import Adapter
from ..errors import ProLoRAError, UnrelatedBases
from ..linalg.lowrank import LowRank
from ..report import finite
from ..version import __version__
from . import fitting, gate, keeping
from .blocks import as_streams, find_blocks, inputs_of, streams
from .keeping import Keep
from .mapping import RidgeMap, features
from .precision import HALVES, in_float32
from .recording import Recorder, Targets, on_shelf
from .shelf import Rows, Shelf, kept
from .trajectories import Sample, applied, output_of, weight_of
from .translation import (
    Convert,
    Question,
    Read,
    Translate,
    Translation,
    same_call,
    same_prediction,
)

Progress = Callable[[int, int, str], None]
STEP_LENGTHS = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class Options:
    """The choices of a probing.

    Attributes:
        rank: of every update written.
        map_ridge: λ of the maps between residual streams, relative to the mean variance.
        fit_ridge: λ of the updates, relative to the mean diagonal of the curvature.
        iterations: conjugate-gradient steps of every linearised problem.
        rounds: how often every block is linearised anew.
        seed: of the trajectories; the held-out ones use the next three.
        force: write the LoRA even where the gate refuses it.
        resume: folder that keeps recorded calls and fitted blocks, so that an interrupted probing
            goes on; what is damaged or was made of anything else is made again.
        samplers: says what the samplers do (prompts, steps); asked for with `resume`, which cannot
            look into functions.
        max_memory: bytes that calls and streams which wait for their use may take; what is above
            goes to temporary files. Models and one call's activations come on top. None: no bound.
        progress: called as progress(done, total, name).
    """

    rank: int = 32
    map_ridge: float = 0.01
    fit_ridge: float = 0.03
    iterations: int = 6
    rounds: int = 2
    seed: int = 0
    force: bool = False
    resume: str | PathLike[str] | None = None
    samplers: str = ""
    max_memory: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Refuses what makes no sense."""
        if min(self.rank, self.iterations, self.rounds) < 1:
            raise ValueError("rank, iterations and rounds must be 1 or more")
        if self.map_ridge <= 0 or self.fit_ridge <= 0:
            raise ValueError("map_ridge and fit_ridge must be positive")
        if self.resume is not None and not self.samplers:
            raise ValueError("resume needs samplers=TEXT that says what the samplers do")

    def told(self) -> str:
        """The choices that a fitted block depends on."""
        idle = ("force", "resume", "samplers", "max_memory", "progress")
        return repr({k: v for k, v in vars(self).items() if k not in idle})


@dataclass(frozen=True)
class BlockReport:
    """One block of the target.

    Attributes:
        name: the block.
        explained: share of the variance of its streams that the source's streams predict; empty
            for the last block, which is fitted to the prediction itself.
        reached: share of the wanted change of its output that the fit reaches on the probes it was
            fitted on, after the cut to rank.
        modules: how many modules got an update.
    """

    name: str
    explained: tuple[float, ...]
    reached: float
    modules: int


@dataclass
class ProbeReport:
    """The account of one probing.

    Attributes:
        probes: calls fitted on, held_out: calls judged on.
        blocks: one row for every block of the target, in the order in which they were fitted.
        left_out: module of the LoRA that lies in no block -> why it was not moved.
        gate: the verdict of the held-out probes.
        rank: of the updates.
        resumed: blocks that were taken from the folder of an interrupted probing.
        seconds: wall time by stage.
    """

    probes: int
    held_out: int
    rank: int
    blocks: list[BlockReport] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    gate: gate.Gate | None = None
    resumed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """The result in plain words."""
        said = [f"{len(self.blocks)} blocks fitted on {self.probes} calls of the models."]
        if self.left_out:
            name, reason = next(iter(self.left_out.items()))
            said.append(f"{len(self.left_out)} modules were not moved; {name}: {reason}.")
        if self.gate:
            said.append(
                f"{self.gate.decision}, at strength {self.gate.strength:g}: {self.gate.reason}."
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return finite(asdict(self) | {"summary": self.sentences()})  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ProbeTransfer:
    """A probed LoRA, strength applied, and its account."""

    adapter: Adapter
    report: ProbeReport

    def save(
        self, path: str | PathLike[str], *, format: str = "auto", dtype: torch.dtype | None = None
    ) -> None:
        """Writes the LoRA whole or not at all; arguments as in `prolora.Transfer.save`."""
        adapters.write(self.adapter, path, format=format, dtype=dtype)


def transfer(
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

    Both models are run on trajectories that they sample themselves from noise: no data. Block by
    block the wanted residual stream is r_t + (r_s with LoRA − r_s)·T, T a ridge map between the
    streams of the two bases; the block's linear modules are fitted to it by linearised least
    squares, with the updates found so far in place. The last block is fitted to the prediction
    itself: v_t + (v_s with LoRA − v_s).

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
        options: the fields of `Options`.

    Raises:
        UnrelatedBases: the gate refuses, and `force` is not set.
        ProLoRAError: a module, block or dtype that probing does not know, named in the message.

    Returns:
        The target's adapter and the report. The models' weights are afterwards as before.
    """
    chosen = Options(**options)
    between = Translation(
        translate or same_call, translate_back or same_call, convert or same_prediction,
        read or output_of,
    )  # fmt: skip
    adapter = _adapter(lora)
    _check(source, target, adapter)
    frozen = [(p, p.requires_grad) for m in (source, target) for p in m.parameters()]
    modes = source.training, target.training
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        source.eval(), target.eval()
        samplers = (sample_source, sample_adapted or sample_source, sample_target)
        compared = adapter.updates if rival is None else rival
        with in_float32(source), in_float32(target):
            return _transfer(source, target, adapter, samplers, between, compared, chosen)
    finally:
        source.train(modes[0]), target.train(modes[1])
        for parameter, needed in frozen:
            parameter.requires_grad_(needed)


def _transfer(
    source: nn.Module, target: nn.Module, adapter: Adapter, samplers: tuple[Sample, Sample, Sample],
    between: Translation, rival: Mapping[str, LowRank], options: Options,
) -> ProbeTransfer:  # fmt: skip
    clock = time.perf_counter
    started = clock()
    keep = Keep(options.resume)
    recorder = Recorder(source, target, adapter, samplers, between, keep, options.samplers)
    quarter = None if options.max_memory is None else options.max_memory // 4
    calls = on_shelf(recorder.questions(options.seed), quarter)
    held_out = on_shelf(recorder.questions(options.seed + 3), quarter)
    report = ProbeReport(len(calls), len(held_out), options.rank)
    report.seconds["sample"] = clock() - started

    started = clock()
    theirs, ours = find_blocks(source, calls[0].source), find_blocks(target, calls[0].target)
    places = _places(target, ours, theirs, adapter, report)
    shelf = Shelf(None if quarter is None else 2 * quarter)
    _wanted(source, target, adapter, calls, theirs, list(places), between, options, report, shelf)
    report.seconds["map"] = clock() - started

    started = clock()
    updates: dict[str, LowRank] = {}
    for i, name in enumerate(places):
        if options.progress:
            options.progress(i, len(places), name)
        key = "" if keep.folder is None else keeping.fingerprint(
            recorder.key, options.told(), name, keeping.updates(updates)
        )  # fmt: skip
        wanted = Rows(shelf, name if i < len(places) - 1 else "", len(calls))
        found = keep.fitted(f"block-{i}", key)
        if found is None:
            fitted = _fit_block(
                target, name, places[name], calls, wanted, updates, between.read, options, report,
            )  # fmt: skip
            keep.keep_fitted(f"block-{i}", key, fitted, {"reached": report.blocks[i].reached})
        else:
            fitted, facts = found
            reached = facts["reached"]
            report.blocks[i] = replace(report.blocks[i], reached=reached, modules=len(fitted))
            report.resumed += 1
        wanted.drop()
        updates |= fitted
    report.seconds["fit"] = clock() - started

    started = clock()
    verdict = gate.judge(
        target, updates, _held_out(source, target, adapter, held_out, between), between.read,
        copied=rival,
    )  # fmt: skip
    report.gate = verdict
    report.seconds["judge"] = clock() - started
    if options.progress:
        options.progress(len(places), len(places), "judged")
    if verdict.decision == gate.REFUSE and not options.force:
        raise UnrelatedBases(f"probing refuses this transfer: {verdict.reason}")
    moved = {n: LowRank(u.up * verdict.strength, u.down) for n, u in updates.items()}
    told = {"prolora.version": __version__, "prolora.method": "probe"}
    new = Adapter(moved, format=adapter.format, dtype=adapter.dtype, metadata=told)
    return ProbeTransfer(new, report)


def _adapter(lora: str | PathLike[str] | Adapter | Mapping[str, LowRank]) -> Adapter:
    if isinstance(lora, Adapter):
        return lora
    if isinstance(lora, str | PathLike):
        return adapters.read(lora)
    return Adapter(dict(lora), format="diffusers")


def _check(source: nn.Module, target: nn.Module, adapter: Adapter) -> None:
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


def _places(
    target: nn.Module, ours: Sequence[str], theirs: Sequence[str], adapter: Adapter,
    report: ProbeReport,
) -> dict[str, list[str]]:  # fmt: skip
    """Target block -> its linear modules whose role the LoRA adapts in some block of the source."""
    roles = set()
    for name in adapter.updates:
        block = next((b for b in theirs if name.startswith(f"{b}.")), None)
        if block is None:
            report.left_out[name] = "it lies in no block; the fit makes up for it in the blocks"
        else:
            roles.add(name.removeprefix(f"{block}."))
    places: dict[str, list[str]] = {}
    for block in ours:
        inside = target.get_submodule(block).named_modules()
        found = [n for n, m in inside if n in roles and isinstance(m, nn.Linear)]
        if found:
            places[block] = found
    if not places:
        raise ProLoRAError("no block of the target has a module that the LoRA adapts")
    return places


@torch.no_grad()
def _wanted(
    source: nn.Module, target: nn.Module, adapter: Adapter, calls: Sequence[Question],
    theirs: Sequence[str], places: Sequence[str], between: Translation, options: Options,
    report: ProbeReport, shelf: Shelf,
) -> None:  # fmt: skip
    """Puts on the shelf, by (call, block), the streams a block should give out.

    The prediction is under (call, "").

    Two rounds over the calls, the first for the covariances of the maps, the second to use them.
    """
    inner = places[:-1]  # the last block is fitted to the prediction
    maps = {(name, i): RidgeMap() for name in inner for i in range(2)}
    for call in calls:
        before, plain = streams(source, theirs, call.source), streams(target, inner, call.target)
        for name in inner:
            for i, stream in enumerate(plain[name]):
                x = features(before, i, stream.shape[1])
                if x is not None:
                    maps[name, i].add(x, stream)
    used = {key: found for key, found in maps.items() if found.count}
    for found in used.values():
        found.solve(options.map_ridge)
    for name in inner:
        explained = tuple(used[name, i].explained for i in range(2) if (name, i) in used)
        report.blocks.append(BlockReport(name, explained, float("nan"), 0))
    report.blocks.append(BlockReport(places[-1], (), float("nan"), 0))

    for k, call in enumerate(calls):
        before, plain = streams(source, theirs, call.source), streams(target, inner, call.target)
        change = -between.of_source(source, call)
        with applied(source, adapter.updates):
            after = streams(source, theirs, call.source)
            change += between.of_source(source, call)
        shelf.put((k, ""), (between.of_target(target, call) + change,))
        for name in inner:
            parts = []
            for i, stream in enumerate(plain[name]):
                x, y = (features(side, i, stream.shape[1]) for side in (before, after))
                if x is None or y is None:
                    parts.append(stream)  # no block of the source has this resolution
                else:
                    parts.append(stream + used[name, i](y - x))
            shelf.put((k, name), tuple(parts))


def _fit_block(
    target: nn.Module, block: str, roles: list[str], calls: Sequence[Question], wanted: Rows,
    updates: dict[str, LowRank], read: Read, options: Options, report: ProbeReport,
) -> dict[str, LowRank]:  # fmt: skip
    """The updates of one block, with those of the blocks before it in place."""
    row = next(i for i, found in enumerate(report.blocks) if found.name == block)
    last = row == len(report.blocks) - 1
    with applied(target, updates):
        if last:
            problem = fitting.Problem(
                target, [f"{block}.{role}" for role in roles], Targets(calls), wanted,
                lambda result: (read(result),), options.fit_ridge, options.iterations,
            )  # fmt: skip
        else:
            limit = None if options.max_memory is None else options.max_memory // 4
            read_by = (inputs_of(target, block, call.target) for call in calls)
            problem = fitting.Problem(
                target.get_submodule(block), roles, kept(read_by, Shelf(limit), block), wanted,
                as_streams, options.fit_ridge, options.iterations,
            )  # fmt: skip
        small = _solved(problem, options)
        reached = _reached(problem, {name: update.dense() for name, update in small.items()})
    old = report.blocks[row]
    report.blocks[row] = BlockReport(block, old.explained, reached, len(small))
    return small if last else {f"{block}.{role}": update for role, update in small.items()}


def _solved(problem: fitting.Problem, options: Options) -> dict[str, LowRank]:
    """Gauss–Newton: linearise, solve, go as far as it helps, linearise there; then cut to rank."""
    total = {name: torch.zeros_like(w) for name, w in problem.weights().items()}
    best = 0.0
    for _ in range(options.rounds):
        in_place = {name: LowRank(d, torch.eye(d.shape[1]).to(d)) for name, d in total.items()}
        with applied(problem.module, in_place):
            step, grams = fitting.fit(problem)
        steps = {
            length: {n: (d + length * step[n]).to(d.dtype) for n, d in total.items()}
            for length in STEP_LENGTHS
        }
        reached = {length: _reached(problem, moved) for length, moved in steps.items()}
        length = max(reached, key=lambda found: reached[found])
        if reached[length] <= best:
            break  # no step helps
        total, best = steps[length], reached[length]
    return {name: fitting.cut(d.double(), grams[name], options.rank) for name, d in total.items()}


@torch.no_grad()
def _reached(problem: fitting.Problem, updates: dict[str, Tensor]) -> float:
    """1 − Σ‖wanted − output with updates‖²/Σ‖wanted − output without‖²."""
    start = problem.weights()
    moved = {name: start[name] + update for name, update in updates.items()}
    left = whole = 0.0
    for call, wanted in zip(problem.calls, problem.wanted, strict=True):
        outputs = [problem.outputs(call, weights) for weights in (start, moved)]
        for w, before, after in zip(wanted, *outputs, strict=True):
            whole += float((w - before).double().square().sum())
            left += float((w - after).double().square().sum())
    return 1 - left / whole if whole else 1.0


def _held_out(
    source: nn.Module, target: nn.Module, adapter: Adapter, questions: Sequence[Question],
    between: Translation,
) -> list[gate.Wanted]:  # fmt: skip
    """What the target should do at calls the fit has not seen."""
    before = [between.of_source(source, question) for question in questions]
    with applied(source, adapter.updates):
        after = [between.of_source(source, question) for question in questions]
    found = []
    for question, v, w in zip(questions, before, after, strict=True):
        plain = between.of_target(target, question)
        found.append(gate.Wanted(question.target, plain, w - v, plain - v))
    return found
