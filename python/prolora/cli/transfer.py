"""`prolora transfer`: its options, and its result for people."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console

from ..bases import open_base
from ..comparison.block_matching import resolve_match
from ..comparison.verdict import AUTO, DEFAULT_THRESHOLD
from ..core.ops import operators
from ..core.projection import DEFAULT_RANK
from ..errors import LowCoverage, OutputError, ProLoRAError
from ..files.writing import check_writable, write_text_atomically
from ..probe.settings import STRATEGIES, Probing, read_prompts
from ..workflow.batch import Outcome, transfer_many
from ..workflow.dry_run import plan_report
from ..workflow.options import DROPPED, METHOD_NAMES, PROBE, TEXT_ENCODER, VECTORS
from ..workflow.report import Report
from ..workflow.transfer import transfer_file
from . import tables
from .basis import show_cache
from .common import (
    CacheOption,
    DeviceOption,
    JsonOption,
    MatchOption,
    MemoryOption,
    NoCacheOption,
    QuietOption,
    RankOption,
    SourceOption,
    TargetOption,
    cache_folder,
    memory_limit,
    parse_rank,
)

out = Console()
err = Console(stderr=True)

Method = Enum("Method", {name: name for name in METHOD_NAMES}, type=str)  # type: ignore[misc]
Format = Enum("Format", {n: n for n in ("auto", "kohya", "diffusers", "peft", "comfy")}, type=str)  # type: ignore[misc]
TextEncoder = Enum("TextEncoder", {n: n for n in TEXT_ENCODER}, type=str)  # type: ignore[misc]
Vectors = Enum("Vectors", {n: n for n in VECTORS}, type=str)  # type: ignore[misc]
Dropped = Enum("Dropped", {n: n for n in DROPPED}, type=str)  # type: ignore[misc]
Strategy = Enum("Strategy", {n: n for n in STRATEGIES}, type=str)  # type: ignore[misc]
Dtype = Enum("Dtype", {n: n for n in ("float32", "float16", "bfloat16")}, type=str)  # type: ignore[misc]

AUTO_METHOD, AUTO_FORMAT = Method(AUTO), Format(AUTO)
COPY_TEXT, SKIP_DROPPED = TextEncoder("copy"), Dropped("skip")
COPY_VECTORS = Vectors("copy")
JOINT = Strategy("joint")

PROBING = "Probing (--method probe)"
PromptOption = Annotated[
    list[str],
    typer.Option(
        help="Prompt to sample, may be repeated; none: unconditional.", rich_help_panel=PROBING
    ),
]


def transfer(
    loras: Annotated[list[Path], typer.Argument(help="LoRA files or PEFT folders.")],
    source: SourceOption,
    target: TargetOption,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Output file; a folder where there are several LoRAs."),
    ] = None,
    rank: RankOption = str(DEFAULT_RANK),
    method: Annotated[
        Method, typer.Option(help="How to move it; auto decides by how far the bases are apart.")
    ] = AUTO_METHOD,
    strength: Annotated[
        str, typer.Option(help="Factor on the update, or 'auto': what suits these bases best.")
    ] = "",
    match: MatchOption = "name",
    threshold: Annotated[
        float, typer.Option(help="Skip modules whose Φ is below this on either side.")
    ] = DEFAULT_THRESHOLD,
    out_rank: Annotated[
        str,
        typer.Option(
            help="Rank of the output: a number, a share of the energy (0.99), a share of the "
            "LoRA's rank (50%), what fits a file of a size (100MB), or 'exact' (at most twice the "
            "input)."
        ),
    ] = "exact",
    dropped: Annotated[
        Dropped, typer.Option(help="Updates of blocks the target lacks: left out, or added on.")
    ] = SKIP_DROPPED,
    text_encoder: Annotated[
        TextEncoder, typer.Option(help="What becomes of its part of the LoRA.")
    ] = COPY_TEXT,
    vectors: Annotated[
        Vectors, typer.Option(help="What becomes of trained biases and normalisation layers.")
    ] = COPY_VECTORS,
    format: Annotated[Format, typer.Option(help="Format of the output.")] = AUTO_FORMAT,
    dtype: Annotated[Dtype | None, typer.Option(help="Factors' dtype; default: as input.")] = None,
    device: DeviceOption = "cpu",
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    max_memory: MemoryOption = "",
    report: Annotated[
        Path | None, typer.Option(help="Also write the whole report to this JSON file.")
    ] = None,
    min_coverage: Annotated[
        float, typer.Option(help="Fail when a smaller share of the LoRA's modules can move.")
    ] = 0.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would move, from headers alone.")
    ] = False,
    prompt: PromptOption = [],  # noqa: B006 (typer copies it)
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file of prompts to sample, one a line.", rich_help_panel=PROBING),
    ] = None,
    probe_images: Annotated[
        int,
        typer.Option(
            help="Images each model samples, and as many held out.", rich_help_panel=PROBING
        ),
    ] = Probing.images,
    probe_steps: Annotated[
        int, typer.Option(help="Steps of the samplers.", rich_help_panel=PROBING)
    ] = Probing.steps,
    probe_size: Annotated[
        int | None,
        typer.Option(
            help="Height and width in pixels; default: the smaller of the two pipelines'.",
            rich_help_panel=PROBING,
        ),
    ] = None,
    probe_guidance: Annotated[
        float | None,
        typer.Option(help="Guidance scale; default: each pipeline's own.", rich_help_panel=PROBING),
    ] = None,
    probe_strategy: Annotated[
        Strategy,
        typer.Option(
            help="All updates at once, or block by block, which takes less memory.",
            rich_help_panel=PROBING,
        ),
    ] = JOINT,
    probe_fit_steps: Annotated[
        int, typer.Option(help="Steps of the joint fit.", rich_help_panel=PROBING)
    ] = Probing.fit_steps,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps what is done, so that an interrupted run goes on.",
            rich_help_panel=PROBING,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Write the LoRA even where held-out probes speak against it.",
            rich_help_panel=PROBING,
        ),
    ] = False,
    redo: Annotated[
        bool, typer.Option("--redo", help="Of several LoRAs, also make again what is there.")
    ] = False,
    modules: Annotated[bool, typer.Option("--modules", help="A table row per module.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the LoRA that belongs on another base model."""
    if output is None and not dry_run:
        raise OutputError("-o OUT is missing: where shall the new LoRA be written?")
    operators.require(device)
    options: dict[str, Any] = {
        "rank": parse_rank(rank),
        "method": method.value,
        "match": match,
        "threshold": threshold,
        "strength": parse_strength(strength),
        "out_rank": parse_out_rank(out_rank),
        "text_encoder": text_encoder.value,
        "dropped": dropped.value,
        "vectors": vectors.value,
        "min_coverage": min_coverage,
        "probe": Probing(
            (*prompt, *(read_prompts(prompts) if prompts else ())),
            probe_images,
            probe_steps,
            probe_size,
            probe_guidance,
            probe_strategy.value,
            probe_fit_steps,
            force,
            resume,
        ),
    }
    if method.value != PROBE and options["probe"] != Probing():
        raise ValueError(
            "prompts, --probe-…, --resume and --force are for probing: add --method probe"
        )
    old, new = open_base(source), open_base(target)
    if report is not None:
        check_writable(report, [*loras, *old.files, *new.files])
    shown = not (quiet or as_json) and err.is_terminal
    factors = getattr(torch, dtype.value) if dtype else None
    folder = cache if dry_run else cache_folder(cache, no_cache)
    with tables.progress_bar("match", shown) as progress:
        options["match"] = resolve_match(
            match, old, new, cache=folder, device=device, progress=progress
        )
    if dry_run:
        written = {"format": format.value, "dtype": factors}
        outcomes = [
            Outcome(lora, lora, plan_report(lora, old, new, **written, **options)) for lora in loras
        ]
    else:
        assert output is not None
        saving: dict[str, Any] = {
            "format": format.value,
            "dtype": factors,
            "cache": folder,
            "device": device,
            "max_memory": memory_limit(max_memory),
        }
        with tables.progress_bar("transfer", shown) as progress:
            saving["progress"] = progress
            if len(loras) > 1 or (output.is_dir() and format.value != "peft"):
                outcomes = transfer_many(loras, old, new, output, redo=redo, **saving, **options)
            else:
                done = transfer_file(loras[0], old, new, output, **saving, **options)
                outcomes = [Outcome(loras[0], output, done)]
    if not (as_json or quiet):
        show_outcomes(outcomes, modules)
        if not dry_run and any(used_subspaces(outcome) for outcome in outcomes):
            show_cache(folder)
    printed = [outcome.to_dict() for outcome in outcomes]
    text = json.dumps(printed[0] if len(loras) == 1 else printed, indent=1)
    if as_json:
        print(text)
    if report is not None:
        write_text_atomically(report, text + "\n")
    failed = [outcome for outcome in outcomes if outcome.error]
    if len(failed) == 1 == len(loras):
        raise cast(ProLoRAError, failed[0].error)
    if failed:
        names = ", ".join(outcome.lora.name for outcome in failed)
        raise ProLoRAError(f"{len(failed)} of {len(loras)} LoRAs were not moved: {names}")
    low = [o for o in outcomes if o.report and o.report.coverage < min_coverage]
    if low:
        raise LowCoverage(f"the coverage of {low[0].lora.name} is below {min_coverage:g}")


def parse_out_rank(text: str) -> int | float | str:
    """'16' as an int, '0.95' as a share, 'exact' and all else as they are: options know better."""
    try:
        return parse_rank(text)
    except ValueError:
        return text


def parse_strength(text: str) -> float | str | None:
    """'0.8' as a number, 'auto' as it is, nothing as None: what the method calls for."""
    if text in ("", AUTO):
        return text or None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--strength takes a number or 'auto', not {text!r}") from None


def show_outcomes(outcomes: list[Outcome], every_module: bool) -> None:
    """The whole report of one LoRA, or a line for each of several."""
    if len(outcomes) > 1:
        out.print(tables.outcomes_table(outcomes))
        for line in tables.failure_lines(outcomes):
            out.print(line, highlight=False, soft_wrap=True, style="red")
        return
    report = outcomes[0].report
    if report is not None:
        show_report(report, every_module)
        if not report.dry_run:
            out.print(f"wrote {outcomes[0].out}", highlight=False, soft_wrap=True)


def used_subspaces(outcome: Outcome) -> bool:
    """Whether a LoRA was moved by a method that looks into the basis cache."""
    return outcome.report is not None and any(row.measures for row in outcome.report.modules)


def show_report(report: Report, every_module: bool = False) -> None:
    """The tables and sentences of a report."""
    if report.decisions:
        out.print(tables.decisions_table(report.decisions, report.dropped_blocks, every_module))
    if report.probe is not None and report.probe.blocks:
        out.print(tables.probe_table(report))
        out.print(f"[dim]{tables.PROBE_LEGEND}[/dim]", highlight=False)
    if report.rows("mapped") and (report.method != PROBE or every_module or report.dry_run):
        out.print(tables.transfer_table(report, every_module))
        if not report.dry_run:
            out.print(f"[dim]{tables.transfer_legend(report, every_module)}[/dim]", highlight=False)
    reasons = tables.reasons_table(report)
    if reasons:
        out.print(reasons)
    for sentence in report.sentences():
        style = "bold yellow" if sentence.startswith("No-go") else None
        out.print(sentence, highlight=False, style=style)
