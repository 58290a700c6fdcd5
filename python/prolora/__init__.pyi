"""Written by docs/make_stub.py: the public names, typed."""

from prolora import adapters as adapters, architectures as architectures, bases as bases, comparison as comparison, core as core, errors as errors, files as files, fitting as fitting
from prolora.core.projection import DEFAULT_RANK as DEFAULT_RANK, project as project
from prolora.core.methods import METHODS as METHODS, Method as Method
from prolora.adapters.adapter import Adapter as Adapter
from prolora.bases import Base as Base, open_base as open_base
from prolora.core.basis import Basis as Basis, truncated_svd as truncated_svd
from prolora.checking.check_result import Check as Check
from prolora.fitting.settings import FitOptions as FitOptions, PassedOn, Precision
from prolora.adapters.lora import Lora as Lora
from prolora.core.lowrank import LowRank as LowRank
from prolora.making.merge_options import MergeMethod, MergeOptions as MergeOptions
from prolora.reports.outcome import Outcome as Outcome
from prolora.errors import ProLoRAError as ProLoRAError
from prolora.core.projection_info import ProjectionInfo as ProjectionInfo
from prolora.reports.report import Report as Report
from prolora.core.subspaces import Similarity as Similarity, principal_angles as principal_angles, similarity as similarity
from prolora.verbs.result import Transfer as Transfer
from prolora.verbs.options import DtypeLike, FormatLike, LoraLike, OutRank, TextEncoderMode, TransferMethod, TransferOptions as TransferOptions
from prolora.version import __version__ as __version__
from collections.abc import Iterable, Sequence
from prolora.bases.opening import BaseLike
from os import PathLike
from prolora.verbs.block_weights import Blocks
from prolora.making.bake_report import BakeReport
from prolora.checking.check import check as check
from prolora.making.convert import ConvertOptions
from prolora.bases.base import Progress
from prolora.making.extract_options import ExtractOptions
from prolora.core.validation import DeviceLike
from prolora.comparison.module_map import Match
from typing import Any
from prolora.core.rank_rule import Rank
from prolora.reports.lora_report import LoraReport
from prolora.fleet.migration import StrPath
from prolora.fleet.batches import Migrated, MigrationOptions
from prolora.bases.experts import Experts, ExpertsLike, open_experts as open_experts
from prolora.core.grouped import project_many as project_many
from prolora.best import Naming

__all__ = [
    "DEFAULT_RANK",
    "METHODS",
    "Adapter",
    "Base",
    "Basis",
    "Check",
    "FitOptions",
    "Lora",
    "LowRank",
    "MergeOptions",
    "Method",
    "Outcome",
    "ProLoRAError",
    "ProjectionInfo",
    "Report",
    "Similarity",
    "Transfer",
    "TransferOptions",
    "__version__",
    "bake",
    "check",
    "convert",
    "extract",
    "fit",
    "fit_many",
    "load_moved_lora",
    "merge",
    "migrate",
    "open_base",
    "open_experts",
    "principal_angles",
    "project",
    "project_many",
    "similarity",
    "transfer",
    "transfer_many",
    "truncated_svd",
]

def bake(
    loras: Sequence[LoraLike | Transfer],
    base: BaseLike,
    out: str | PathLike[str] | None = ...,
    options: MergeOptions = ...,
    *,
    stochastic: int | None = ...,
    progress: Progress | None = ...,
    format: FormatLike | None = ...,
    dtype: DtypeLike | None = ...,
    overwrite: bool = ...,
    out_rank: OutRank = ...,
    method: MergeMethod = ...,
    strengths: Sequence[float] | None = ...,
    blocks: str | Sequence[Blocks | None] | None = ...,
) -> BakeReport: ...

def convert(
    lora: LoraLike | Transfer,
    base: BaseLike | None = ...,
    options: ConvertOptions = ...,
    *,
    out: str | PathLike[str] | None = ...,
    progress: Progress | None = ...,
    format: FormatLike | None = ...,
    dtype: DtypeLike | None = ...,
    overwrite: bool = ...,
    out_rank: OutRank = ...,
    blocks: Blocks | None = ...,
    alpha: float | None = ...,
) -> Transfer: ...

def extract(
    base: BaseLike,
    tuned: BaseLike,
    options: ExtractOptions = ...,
    *,
    out: str | PathLike[str] | None = ...,
    dry_run: bool = ...,
    progress: Progress | None = ...,
    device: DeviceLike = ...,
    max_memory: int | str | None = ...,
    format: FormatLike | None = ...,
    dtype: DtypeLike | None = ...,
    overwrite: bool = ...,
    out_rank: OutRank = ...,
) -> Transfer: ...

def fit(
    lora: LoraLike | Transfer,
    source: BaseLike | None,
    target: BaseLike,
    options: FitOptions = ...,
    *,
    out: str | PathLike[str] | None = ...,
    dry_run: bool = ...,
    prompts: tuple[str, ...] = ...,
    images: int = ...,
    steps: int = ...,
    size: int | None = ...,
    guidance: float | None = ...,
    target_steps: int | None = ...,
    target_guidance: float | None = ...,
    look: float | str = ...,
    rank: float | None = ...,
    fit_steps: int = ...,
    probes: int | None = ...,
    held_out: int | None = ...,
    batch: int | None = ...,
    seed: int = ...,
    precision: Precision = ...,
    force: bool = ...,
    resume: str | PathLike[str] | None = ...,
    shown_prompts: int = ...,
    progress: Progress | None = ...,
    device: DeviceLike = ...,
    max_memory: int | str | None = ...,
    cache: str | PathLike[str] | None = ...,
    format: FormatLike | None = ...,
    dtype: DtypeLike | None = ...,
    overwrite: bool = ...,
    text_encoder: PassedOn = ...,
    match: Match = ...,
    again: bool = ...,
    pictures: str | PathLike[str] | None = ...,
    max_vram: int | str | None = ...,
) -> Transfer: ...

def fit_many(
    loras: Iterable[str | PathLike[str]],
    source: BaseLike | None,
    target: BaseLike,
    folder: str | PathLike[str],
    options: FitOptions = ...,
    *,
    prompts: tuple[str, ...] = ...,
    images: int = ...,
    steps: int = ...,
    size: int | None = ...,
    guidance: float | None = ...,
    target_steps: int | None = ...,
    target_guidance: float | None = ...,
    look: float | str = ...,
    rank: float | None = ...,
    fit_steps: int = ...,
    probes: int | None = ...,
    held_out: int | None = ...,
    batch: int | None = ...,
    seed: int = ...,
    precision: Precision = ...,
    force: bool = ...,
    resume: str | PathLike[str] | None = ...,
    shown_prompts: int = ...,
    progress: Progress | None = ...,
    device: DeviceLike = ...,
    max_memory: int | str | None = ...,
    cache: str | PathLike[str] | None = ...,
    format: FormatLike | None = ...,
    dtype: DtypeLike | None = ...,
    overwrite: bool = ...,
    text_encoder: PassedOn = ...,
    match: Match = ...,
    again: bool = ...,
    pictures: str | PathLike[str] | None = ...,
    max_vram: int | str | None = ...,
) -> list[Outcome]: ...

def load_moved_lora(
    pipe: Any,
    lora: LoraLike | Transfer,
    source: BaseLike,
    options: TransferOptions = ...,
    *,
    adapter_name: str | None = ...,
    adapter_weight: float = ...,
    progress: Progress | None = ...,
    device: DeviceLike = ...,
    max_memory: int | str | None = ...,
    cache: str | PathLike[str] | None = ...,
    format: FormatLike | None = ...,
    dtype: DtypeLike | None = ...,
    overwrite: bool = ...,
    out_rank: OutRank = ...,
    method: TransferMethod = ...,
    strength: float = ...,
    rank: Rank = ...,
    blocks: Blocks | None = ...,
    threshold: float = ...,
    text_encoder: TextEncoderMode = ...,
    again: bool = ...,
    match: Match = ...,
    target_steps: int | None = ...,
    prompts: tuple[str, ...] = ...,
    look: float | str = ...,
) -> LoraReport: ...

def merge(
    loras: Sequence[LoraLike | Transfer],
    target: BaseLike | None = ...,
    options: MergeOptions = ...,
    *,
    out: str | PathLike[str] | None = ...,
    progress: Progress | None = ...,
    format: FormatLike | None = ...,
    dtype: DtypeLike | None = ...,
    overwrite: bool = ...,
    out_rank: OutRank = ...,
    method: MergeMethod = ...,
    strengths: Sequence[float] | None = ...,
    blocks: str | Sequence[Blocks | None] | None = ...,
) -> Transfer: ...

def migrate(
    loras: StrPath | Iterable[StrPath],
    source: StrPath,
    target: StrPath | Sequence[StrPath],
    folder: StrPath,
    options: MigrationOptions = ...,
    *,
    ray: str | None = ...,
    shard: str | None = ...,
    dry_run: bool = ...,
    progress: Progress | None = ...,
    device: DeviceLike = ...,
    max_memory: int | str | None = ...,
    cache: str | PathLike[str] | None = ...,
    format: FormatLike | None = ...,
    dtype: DtypeLike | None = ...,
    overwrite: bool = ...,
    out_rank: OutRank = ...,
    method: TransferMethod = ...,
    strength: float = ...,
    rank: Rank = ...,
    blocks: Blocks | None = ...,
    threshold: float = ...,
    text_encoder: TextEncoderMode = ...,
    again: bool = ...,
    match: Match = ...,
    target_steps: int | None = ...,
    prompts: tuple[str, ...] = ...,
    look: float | str = ...,
    verify: bool = ...,
) -> list[Migrated]: ...

def transfer(
    lora: LoraLike | Transfer,
    source: BaseLike,
    target: BaseLike,
    options: TransferOptions = ...,
    *,
    out: str | PathLike[str] | None = ...,
    dry_run: bool = ...,
    progress: Progress | None = ...,
    device: DeviceLike = ...,
    max_memory: int | str | None = ...,
    cache: str | PathLike[str] | None = ...,
    format: FormatLike | None = ...,
    dtype: DtypeLike | None = ...,
    overwrite: bool = ...,
    out_rank: OutRank = ...,
    method: TransferMethod = ...,
    strength: float = ...,
    rank: Rank = ...,
    blocks: Blocks | None = ...,
    threshold: float = ...,
    text_encoder: TextEncoderMode = ...,
    again: bool = ...,
    match: Match = ...,
    target_steps: int | None = ...,
    prompts: tuple[str, ...] = ...,
    look: float | str = ...,
) -> Transfer: ...

def transfer_many(
    loras: Iterable[str | PathLike[str]],
    source: ExpertsLike | Experts,
    target: ExpertsLike | Experts,
    folder: str | PathLike[str],
    options: TransferOptions = ...,
    *,
    naming: Naming | None = ...,
    progress: Progress | None = ...,
    device: DeviceLike = ...,
    max_memory: int | str | None = ...,
    cache: str | PathLike[str] | None = ...,
    format: FormatLike | None = ...,
    dtype: DtypeLike | None = ...,
    overwrite: bool = ...,
    out_rank: OutRank = ...,
    method: TransferMethod = ...,
    strength: float = ...,
    rank: Rank = ...,
    blocks: Blocks | None = ...,
    threshold: float = ...,
    text_encoder: TextEncoderMode = ...,
    again: bool = ...,
    match: Match = ...,
    target_steps: int | None = ...,
    prompts: tuple[str, ...] = ...,
    look: float | str = ...,
) -> list[Outcome]: ...
