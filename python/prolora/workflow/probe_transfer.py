"""A transfer by probing: two pipeline folders are opened, run and fitted, and accounted for."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..bases import Base, vae
from ..bases.identity import compute_identity
from ..bases.memory import format_size, resident_bytes
from ..comparison.module_map import TEXT_ENCODERS
from ..comparison.verdict import AUTO, DEFAULT_THRESHOLD
from ..core.lowrank import LowRank
from ..core.projection import DEFAULT_RANK
from ..errors import TooLittleMemory, UnrelatedBases, UnsupportedFormat
from .move_updates import describe_unchanged
from .options import PROBE, Options
from .plan import Plan, check_fits_source, place_text_encoders
from .report import ModuleReport, Report

# A block that repeats, in diffusers' names, and the module inside.
_IN_BLOCK = re.compile(r"(?:.+\.)?(?:single_)?transformer_blocks\.\d+\.(.+)")
_NO_PLACE = "it lies in no transformer block; the fit makes up for it in the blocks"
_VECTOR = "probing fits matrices only, no biases or normalisation layers"


@dataclass
class ProbeResult:
    """What probing made of a LoRA.

    Attributes:
        updates: target module -> update, text encoders carried over included.
        rows: one for every module of the LoRA, and one for each further target module.
        left_out: vector of the LoRA -> why it is not moved.
        probe: the account of the probing; None in a dry run.
        rival_serves: True where moving by weights alone does no worse on held-out probes: then
            nothing else is set but the factor that suits its result.
        strength: the factor that the held-out probes chose, times the one asked for.
        facts: what the file's header says of it, beside what it says of any transfer.
        seconds: wall time by stage.
    """

    updates: dict[str, LowRank] = field(default_factory=dict)
    rows: list[ModuleReport] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    probe: Any = None
    rival_serves: bool = False
    strength: float = 1.0
    facts: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def check_probing(source: Base, target: Base, options: Options) -> None:
    """Refuses before any model is loaded.

    Raises:
        UnsupportedFormat: a base that is no pipeline folder.
        UnrelatedBases: pipelines with different latents.
        ValueError: an option that probing has no use for.
    """
    idle = {
        "match": options.match == "name",
        "dropped": options.dropped == "skip",
        "rank": options.rank == DEFAULT_RANK,
        "damping": options.damping is None,
        "threshold": options.threshold == DEFAULT_THRESHOLD,
        "text_encoder project": options.text_encoder != "project",
        "strength auto": options.strength != AUTO,
    }
    used = [name for name, unused in idle.items() if not unused]
    if used:
        raise ValueError(
            f"method 'probe' has no use for {', '.join(used)}: it looks at the running models, not "
            "at pairs of weights; its rank is out_rank"
        )
    for side, base in (("source", source), ("target", target)):
        if not vae.is_pipeline(base.path):
            raise UnsupportedFormat(
                f"the {side} {base.path or base.name} is no pipeline folder: --method probe runs "
                "the models, so both bases must be folders of whole diffusers pipelines "
                f"({vae.PIPELINE_INDEX}, scheduler, text encoders, and unet or "
                "transformer). A single "
                "file becomes one by StableDiffusionPipeline.from_single_file(FILE)"
                ".save_pretrained(FOLDER) and the like; a model on the hub by downloading all of it"
            )
    assert source.path is not None and target.path is not None
    vae.check_latents(source.path, target.path)


def plan_probing(adapter: Adapter, source: Base, target: Base, options: Options) -> Plan:
    """Which modules are fitted (as pairs, by the name on the source), passed on or skipped.

    Raises:
        UnsupportedFormat, ShapeMismatch: an update that is not the source's.
    """
    found = Plan(rule="running models")
    own = place_text_encoders(adapter, source, target, options.text_encoder, found)
    check_fits_source(adapter, own, source)
    for name in [n for n in found.passed if _has_other_width(n, source, target)]:
        found.passed.remove(name)
        found.skipped[name] = "the target has another text encoder, where it means nothing"
    inside = fitted_modules(own, source)
    found.skipped |= {name: _NO_PLACE for name in own if name not in inside}
    return found


def _has_other_width(name: str, source: Base, target: Base) -> bool:
    """Whether the target's text encoder cannot hold this update."""
    return name in source.shapes and source.shapes[name] != target.shapes.get(name)


def fitted_modules(names: list[str], source: Base) -> set[str]:
    """Those of the LoRA's modules whose change is fitted: linear ones in transformer blocks."""
    return {n for n in names if _IN_BLOCK.fullmatch(n) and len(source.shapes.get(n, ())) == 2}


def target_modules(adapter: Adapter, source: Base, target: Base) -> dict[str, tuple[int, ...]]:
    """Target module -> shape, of all that may get an update: the roles that the LoRA adapts."""
    roles = {
        match[1]
        for name in fitted_modules(list(adapter.updates), source)
        if (match := _IN_BLOCK.fullmatch(name))
    }
    return {
        name: shape
        for name, shape in target.shapes.items()
        if (match := _IN_BLOCK.fullmatch(name)) and match[1] in roles and len(shape) == 2
    }


def outline_fit(adapter: Adapter, plan: Plan, source: Base, target: Base) -> dict[str, LowRank]:
    """Updates of the names and shapes that will be written, without values."""
    found = {
        name: LowRank(torch.zeros(shape[0], 1), torch.zeros(1, shape[1]))
        for name, shape in target_modules(adapter, source, target).items()
    }
    return found | {name: adapter.updates[name] for name in plan.passed}


def outline_probing(adapter: Adapter, source: Base, target: Base, options: Options) -> ProbeResult:
    """What would be fitted, from names and shapes alone."""
    found, there = (
        plan_probing(adapter, source, target, options),
        target_modules(adapter, source, target),
    )
    done = ProbeResult(left_out={name: _VECTOR for name in adapter.vectors})
    done.rows = _list_modules(adapter, found, source, dict.fromkeys(there), "would be fitted")
    return done


def run_probing(
    adapter: Adapter,
    source: Base,
    target: Base,
    found: Plan,
    options: Options,
    rival: Mapping[str, LowRank],
) -> ProbeResult:
    """Runs the pipelines, fits, and compares with the LoRA moved by weights alone.

    Args:
        adapter: the LoRA of the source.
        source: the base it was trained on, a pipeline folder.
        target: the base it shall move to, likewise.
        found: from `plan_probing`.
        options: of the transfer.
        rival: the updates that the target would get without probing; empty where there are none.

    Raises:
        UnrelatedBases: the held-out probes speak against it, and `force` is not set.
        ProLoRAError: see `probe.transfer` and `probe.pipelines`.
    """
    from .. import probe as room
    from ..probe import pipelines
    from ..probe.gate import COPY

    assert source.path is not None and target.path is not None
    models = [pipelines.open_pipeline(p, options.device) for p in (source.path, target.path)]
    pair = pipelines.pair_pipelines(models[0], models[1], options.probe)
    own = _drop_text_encoders(adapter.updates)
    chosen: dict[str, Any] = {
        "force": options.probe.force,
        "progress": options.progress,
        "strategy": options.probe.strategy,
        "steps": options.probe.fit_steps,
    }
    if options.probe.resume is not None:
        bases = [compute_identity(base) for base in (source, target)]
        chosen["resume"] = options.probe.resume
        chosen["samplers"] = json.dumps([pair.told(), *bases])
    if options.max_memory is not None:
        chosen["max_memory"] = _memory_left(options.max_memory)
    if options.out_rank != "exact":
        chosen["rank"] = options.out_rank
    images = itertools.count(1)

    def sampled() -> None:
        if options.progress:
            options.progress(next(images), 6 * options.probe.images, "sampling")

    result = room.fit_lora(
        pair.source.denoiser,
        pair.target.denoiser,
        adapter.with_updates(own),
        pair.source.sampler(pair.settings, sampled),
        pair.target.sampler(pair.settings, sampled),
        translate=pair.between.translate,
        translate_back=pair.between.translate_back,
        convert=pair.between.convert,
        read=pair.between.read,
        rival=_drop_text_encoders(rival),
        **chosen,
    )
    factor = options.factor
    updates = {
        name: LowRank(update.up * factor, update.down).to("cpu")
        for name, update in result.adapter.updates.items()
    }
    gate = result.report.gate
    if gate and gate.decision == COPY and not options.probe.force:
        if not gate.copy_serves:
            raise UnrelatedBases(
                f"neither probing nor moving by weights serves here: {gate.reason}"
            )
        return ProbeResult(probe=result.report, rival_serves=True, strength=gate.copy_strength)
    done = ProbeResult(probe=result.report, left_out={name: _VECTOR for name in adapter.vectors})
    done.strength = factor * (gate.strength if gate else 1.0)
    copied = [name for name in found.skipped if name in updates]
    for name in copied:  # where a fit starts from the copy, what is outside the blocks stays copied
        del found.skipped[name]
    done.rows = _list_modules(adapter, found, source, updates, "fitted to the running models")
    done.rows = [
        replace(row, reason="copied; the fit in the blocks goes on from there")
        if row.source in copied
        else row
        for row in done.rows
    ]
    done.rows = [replace(row, strength=done.strength) if row.rank_out else row for row in done.rows]
    done.updates = updates | {name: adapter.updates[name] for name in found.passed}
    done.seconds = dict(result.report.seconds)
    done.facts = {
        "prolora.probe_calls": str(result.report.probes),
        "prolora.probe_prompts": str(len(options.probe.prompts)),
        "prolora.probe_decision": gate.decision if gate else "",
        "prolora.probe_share": f"{gate.share['all']:.3f}" if gate else "",
    }
    return done


def kernel_sizes(updates: Mapping[str, LowRank], target: Base) -> dict[str, tuple[int, int]]:
    """(kh, kw) of those that are convolutions of the target."""
    shapes = {name: target.shapes.get(name, ()) for name in updates}
    return {name: (s[2], s[3]) for name, s in shapes.items() if len(s) == 4}


def _drop_text_encoders(updates: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The updates of the UNet or transformer: text encoders are not run with the LoRA."""
    return {name: u for name, u in updates.items() if not name.startswith(TEXT_ENCODERS)}


def build_probe_report(done: ProbeResult, source: Base, target: Base, options: Options) -> Report:
    """The report of a probing, or of what one would do."""
    return Report(
        method=PROBE,
        rank_rule=options.rank,
        threshold=0.0,
        match="running models",
        source=source.name,
        target=target.name,
        modules=done.rows,
        left_out=dict(done.left_out),
        strength=done.strength,
        probe=done.probe,
        seconds=done.seconds,
    )


def prefix_notes(notes: Mapping[str, str]) -> dict[str, str]:
    """Notes on how the file was made, as its header has them."""
    return {f"prolora.{key}": text for key, text in notes.items()}


def scale_transfer(
    adapter: Adapter, account: Report, done: ProbeResult, notes: Mapping[str, str]
) -> tuple[Adapter, Report]:
    """A LoRA moved by weights alone, and its report, at the strength that held-out probes chose."""
    factor = done.strength

    def ours(name: str | None) -> bool:
        return name is not None and not name.startswith(TEXT_ENCODERS)

    updates = {
        name: LowRank(u.up * factor, u.down) if ours(name) else u
        for name, u in adapter.updates.items()
    }
    vectors = {n: factor * v if ours(n) else v for n, v in adapter.vectors.items()}
    rows = [
        replace(row.at_strength(factor), strength=row.strength * factor)
        if ours(row.target)
        else row
        for row in account.modules
    ]
    account = replace(
        account, asked=PROBE, probe=done.probe, strength=account.strength * factor, modules=rows
    )
    facts = {"prolora.strength": f"{account.strength:.4g}", "prolora.asked": PROBE}
    metadata = adapter.metadata | facts | prefix_notes(notes)
    return replace(adapter, updates=updates, vectors=vectors, metadata=metadata), account


def _memory_left(limit: int) -> int:
    """What a bound on memory leaves for calls and streams once the models are there.

    Raises:
        TooLittleMemory: nothing.
    """
    taken = resident_bytes()
    if taken >= limit:
        raise TooLittleMemory(
            f"--max-memory {format_size(limit)} is too little: the two pipelines alone take "
            f"{format_size(taken)}"
        )
    return limit - taken


def _list_modules(
    adapter: Adapter, found: Plan, source: Base, updates: Mapping[str, LowRank | None], how: str
) -> list[ModuleReport]:
    """What became of every module of the LoRA, and the target's further modules."""
    rows = []
    for name in adapter.updates:
        row = describe_unchanged(adapter, name, name, "text encoder, carried over unchanged")
        if name in found.skipped and name in updates:  # the fit started from the copy
            row = _fitted_row(row, adapter.updates[name], updates, "moved without probing")
        elif name in found.skipped:
            reason = found.skipped[name]
            row = replace(row, target=None, status="skipped", reason=reason, rank_out=0)
        elif name not in found.passed:
            row = _fitted_row(row, adapter.updates[name], updates, how)
        rows.append(row)
    for name, update in updates.items():
        if name not in adapter.updates:  # rank_in 0: not counted as a module of the LoRA
            reason = f"{how}; the LoRA has no module of that name"
            shape = tuple(update.shape) if update else ()
            rank = update.rank if update else 0
            rows.append(
                ModuleReport(
                    source=name,
                    target=name,
                    status="mapped",
                    reason=reason,
                    shape=shape,
                    rank_in=0,
                    rank_out=rank,
                    surviving_energy=math.nan,
                    norm_ratio=math.nan,
                    copy_distance=math.nan,
                )
            )
    return rows


def _fitted_row(
    row: ModuleReport, update: LowRank, updates: Mapping[str, LowRank | None], how: str
) -> ModuleReport:
    """A module whose change the target's blocks were fitted to; compared where it has a twin."""
    twin = updates.get(row.source)
    rank = twin.rank if twin else 0
    row = replace(
        row,
        reason=how,
        rank_out=rank,
        surviving_energy=math.nan,
        norm_ratio=math.nan,
        copy_distance=math.nan,
    )
    if row.source not in updates:
        # Fewer blocks there: what it does is asked of the blocks that are there.
        return replace(row, target=None, reason=f"{how}; the target has no module of that name")
    norm = float(update.norm())
    if twin is None or tuple(twin.shape) != tuple(update.shape) or not norm:
        return row
    ratio = float(twin.norm()) / norm
    apart = LowRank(torch.cat([twin.up, -update.up], 1), torch.cat([twin.down, update.down], 0))
    return replace(
        row, surviving_energy=ratio**2, norm_ratio=ratio, copy_distance=float(apart.norm()) / norm
    )
