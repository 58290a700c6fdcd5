"""The main job: a LoRA of one base in, the LoRA of another base out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import adapters
from ..adapters.adapter import Adapter
from ..bases import Base, BaseLike, open_base
from ..bases.base import Progress
from ..comparison.contested_blocks import InsertedMode
from ..comparison.module_map import Match
from ..comparison.verdict import DEFAULT_THRESHOLD, LookMode
from ..core.precision import in_full_precision
from ..core.projection import DEFAULT_RANK
from ..core.rank_rule import Rank
from ..probe.settings import Probing
from .by_probing.pipeline import transfer_by_probing
from .by_weights.file_budget import OutputForm
from .by_weights.pipeline import Notes, list_inputs, transfer_by_weights
from .options import (
    DEFAULT_PROBING,
    DroppedMode,
    DtypeLike,
    FormatLike,
    LoraLike,
    MethodChoice,
    Strength,
    TextEncoderMode,
    TransferOptions,
    VectorsMode,
    read_dtype,
)
from .out_rank import OutRank
from .output_paths import check_output
from .report import Report
from .resume import Recipe


@dataclass(frozen=True, repr=False)
class Transfer:
    """A finished transfer, in memory.

    Attributes:
        adapter: the LoRA of the target.
        report: what was kept and lost.
        inputs: the files that it was made of, which `save` does not overwrite.
    """

    adapter: Adapter
    report: Report
    inputs: list[Path] = field(default_factory=list)

    def __repr__(self) -> str:
        """One line: the LoRA and what became of its modules."""
        return f"Transfer({self.adapter!r}, {self.report!r})"

    def save(
        self,
        path: str | PathLike[str],
        *,
        format: FormatLike = "auto",
        dtype: DtypeLike | None = None,
        overwrite: bool = False,
    ) -> None:
        """Writes the LoRA: to a temporary file, read back and compared, then renamed.

        Args:
            path: a .safetensors file, or a folder for `format="peft"`.
            format: "auto" (as it came in), "kohya", "diffusers", "peft" or "comfy"; or the
                program that reads the file: "comfyui", "a1111", "forge", "invokeai", ….
            dtype: of the factors, "float16", "bfloat16", "float32" or "float64"; None means as they
                came in.
            overwrite: replace a file that prolora did not write. A result of prolora that nobody
                has changed since is replaced in any case.

        Raises:
            ForeignFile: a file is there that prolora did not write.
            OutputError: the path cannot be written, or is one of the inputs.
            NonFiniteWeights: a factor overflows in dtype.
            UnsupportedFormat: the format has no name for a module.
        """
        check_output(path, self.inputs, overwrite)
        adapters.write_adapter(self.adapter, path, format=format, dtype=read_dtype(dtype))

    def state_dict(
        self, format: FormatLike = "auto", *, dtype: DtypeLike | None = None
    ) -> dict[str, Tensor]:
        """The tensors of the file that `save` writes, without a file.

        `pipe.load_lora_weights(done.state_dict("diffusers"))` loads the LoRA into a
        diffusers pipeline of the target.

        Args:
            format: as `save` takes it.
            dtype: as `save` takes it.

        Returns:
            Key -> tensor on the CPU: factors [out, r] and [r, in], of convolutions [out, r, 1, 1]
            and [r, in, kh, kw]; the scale is 1 for every loader.

        Raises:
            UnsupportedFormat: the format has no name for a module.
            NonFiniteWeights: a factor overflows in dtype.
            OutputError: no module is left in the adapter.
        """
        return adapters.encode_state_dict(self.adapter, format=format, dtype=read_dtype(dtype))

    def peft_config(self) -> dict[str, Any]:
        """The keywords of a `peft.LoraConfig` that fits `state_dict("peft")`, with a scale of 1.

        Raises:
            UnsupportedFormat: PEFT has no name for a module, or the adapter has several models.
        """
        return adapters.describe_peft_config(self.adapter)


def transfer(
    lora: LoraLike,
    source: BaseLike,
    target: BaseLike,
    *,
    method: MethodChoice = "auto",
    rank: Rank = DEFAULT_RANK,
    match: Match = "name",
    threshold: float = DEFAULT_THRESHOLD,
    damping: float | None = None,
    strength: Strength | None = None,
    look: LookMode = "target",
    out_rank: OutRank = "exact",
    dropped: DroppedMode = "skip",
    inserted: InsertedMode = "skip",
    text_encoder: TextEncoderMode = "copy",
    vectors: VectorsMode = "copy",
    min_coverage: float = 0.0,
    again: bool = False,
    format: FormatLike | None = None,
    dtype: DtypeLike | None = None,
    cache: str | PathLike[str] | None = None,
    device: str | None = None,
    max_memory: int | str | None = None,
    probe: Probing = DEFAULT_PROBING,
    progress: Progress | None = None,
) -> Transfer:
    """Turns a LoRA of one base model into the LoRA of another, without training and without data.

    Args:
        lora: a .safetensors file, a PEFT folder, a state dict or an `Adapter`.
        source: the base that the LoRA was trained on: a file, a folder, an id on the hub, a mapping
            name -> tensor, an nn.Module or an opened `Base`.
        target: the base to move to, in any of these forms.
        method: "auto" (chosen by how far the bases are apart), "prolora" (the paper), "subspace"
            (its ablation without the complement), "lora-x", "blocks", "copy" (the update as it is),
            "damped" (weakened along the drift of the weights) or "probe" (fitted to the running
            models).
        rank: columns of the subspaces, or the share of energy that they hold, between 0 and 1.
        match: how modules are paired: "name"; "similarity" (blocks are recognised by their
            weights); a JSON file or a mapping {target module: source module}.
        threshold: the overlap Φ that both sides of a pair must reach, 0 … 1; a pair below it gets
            no update.
        damping: κ of "damped"; None chooses it by the drift between the bases.
        strength: factor on every update; "auto" chooses it by the drift between the bases; None
            means "auto" for method "auto" and 1 for any other method.
        look: what the automatic method and strength aim at: "target", what the LoRA means in the
            target's own look; "lora", the images that the LoRA was made for.
        out_rank: "exact" keeps every singular value of the result; an int keeps at most that many;
            a share between 0 and 1 the fewest that hold this much of an update's energy; "50%" half
            as many as the LoRA's own rank; "100MB" those that fit a file of that size.
        dropped: "skip" leaves out the updates of blocks that the target has dropped; "sum" adds
            them to those of the nearest block that is still there.
        inserted: what feeds blocks that the target has more, where blocks are matched by
            similarity: "skip" nothing, "similar" the block of the source that they resemble,
            "previous" the block that feeds the one before them.
        text_encoder: "copy" carries the text encoders' updates over unchanged, "project" moves
            them as all others, "skip" leaves them out.
        vectors: "copy" carries trained biases and normalisation layers over, "skip" leaves them
            out.
        min_coverage: the least share of the LoRA's modules that must find a place, 0 … 1.
        again: moves a LoRA that prolora moved before from any base; else `source` must be the base
            that it was moved to.
        format: the format that the result must fit: "auto", "kohya", "diffusers", "peft" or
            "comfy"; None asks for none.
        dtype: of the factors in the file; counts where `out_rank` is a size.
        cache: folder that keeps subspaces for later LoRAs; None keeps nothing.
        device: where to compute, as torch names it; "auto" means a GPU where there is one, None the
            CPU.
        max_memory: bytes of memory that this process may take, or a text such as "2GiB"; None sets
            no bound.
        probe: what method "probe" samples.
        progress: called as progress(done, total, name); what it raises ends the call, and nothing
            is written.

    Returns:
        The LoRA of the target in memory, with the report.

    Raises:
        InvalidOption: an option has a value that it does not take.
        UnsupportedFormat: a file, key or adapter type that cannot be read exactly, or a result that
            `format` cannot hold.
        ShapeMismatch: an update or a pair of weights that does not fit.
        NonFiniteWeights: NaN or Inf, named. All of these before any SVD runs.
        AlreadyMoved: prolora moved the LoRA before, to another base than `source`.
        OutputError: out_rank is a size that one column a module exceeds.
        TooLittleMemory: max_memory is below what the largest weight needs.
        UnrelatedBases: method "auto", and the weights have nothing in common; method "probe", and
            the held-out probes speak against it.
        LowCoverage: fewer modules moved than `min_coverage` asks for.
    """
    options = TransferOptions(
        method=method,
        rank=rank,
        match=match,
        threshold=threshold,
        damping=damping,
        strength=strength,
        look=look,
        out_rank=out_rank,
        dropped=dropped,
        inserted=inserted,
        text_encoder=text_encoder,
        vectors=vectors,
        min_coverage=min_coverage,
        again=again,
        cache=cache,
        device=device,
        max_memory=max_memory,
        probe=probe,
        progress=progress,
    )
    output = OutputForm.of(options, format, dtype)
    return run_transfer(lora, open_base(source), open_base(target), options, output)


@in_full_precision
def run_transfer(
    lora: LoraLike,
    source: Base,
    target: Base,
    options: TransferOptions,
    output: OutputForm,
    notes: Notes | None = None,
) -> Transfer:
    """Moves a LoRA through the pipeline that its method needs.

    Raises:
        ProLoRAError: see `transfer`.
    """
    pipeline = transfer_by_probing if options.runs_models else transfer_by_weights
    result = pipeline(lora, source, target, options, output, notes)
    return Transfer(result.adapter, result.report, list_inputs(lora, source, target))


def transfer_file(
    lora: str | PathLike[str],
    source: BaseLike,
    target: BaseLike,
    out: str | PathLike[str],
    *,
    method: MethodChoice = "auto",
    rank: Rank = DEFAULT_RANK,
    match: Match = "name",
    threshold: float = DEFAULT_THRESHOLD,
    damping: float | None = None,
    strength: Strength | None = None,
    look: LookMode = "target",
    out_rank: OutRank = "exact",
    dropped: DroppedMode = "skip",
    inserted: InsertedMode = "skip",
    text_encoder: TextEncoderMode = "copy",
    vectors: VectorsMode = "copy",
    min_coverage: float = 0.0,
    again: bool = False,
    format: FormatLike = "auto",
    dtype: DtypeLike | None = None,
    overwrite: bool = False,
    cache: str | PathLike[str] | None = None,
    device: str | None = None,
    max_memory: int | str | None = None,
    probe: Probing = DEFAULT_PROBING,
    progress: Progress | None = None,
) -> Report:
    """Moves a LoRA from file to file: `transfer`, then `Transfer.save`.

    The output path is checked before any work. Every option has the meaning that it has in
    `transfer`; `format`, `dtype` and `overwrite` have those of `Transfer.save`.

    Returns:
        What was kept and lost.

    Raises:
        ForeignFile: a file is there that prolora did not write.
        OutputError: out cannot be written, or is an input.
        ProLoRAError: everything that `transfer` raises.
    """
    options = TransferOptions(
        method=method,
        rank=rank,
        match=match,
        threshold=threshold,
        damping=damping,
        strength=strength,
        look=look,
        out_rank=out_rank,
        dropped=dropped,
        inserted=inserted,
        text_encoder=text_encoder,
        vectors=vectors,
        min_coverage=min_coverage,
        again=again,
        cache=cache,
        device=device,
        max_memory=max_memory,
        probe=probe,
        progress=progress,
    )
    output = replace(OutputForm.of(options, format, dtype), overwrite=overwrite)
    return run_transfer_file(Path(lora), open_base(source), open_base(target), out, options, output)


def run_transfer_file(
    lora: Path,
    source: Base,
    target: Base,
    out: str | PathLike[str],
    options: TransferOptions,
    output: OutputForm,
) -> Report:
    """`transfer_file`, its options checked and its bases opened.

    Raises:
        OutputError: out cannot be written, or is an input.
        ProLoRAError: see `transfer`.
    """
    check_output(out, list_inputs(lora, source, target), output.overwrite)
    recipe = Recipe.of(lora, source, target, options, output)
    done = run_transfer(lora, source, target, options, output, recipe.describe)
    if options.progress:
        moved = len(done.adapter.updates)
        options.progress(moved, moved, f"writing {Path(out).name}")
    return save_result(done, Path(out), output)


def save_result(done: Transfer, out: Path, output: OutputForm) -> Report:
    """Writes a result and returns its report, with the time that writing took."""
    started = time.perf_counter()
    format = output.format or "auto"
    done.save(out, format=format, dtype=output.dtype, overwrite=output.overwrite)
    seconds = done.report.seconds | {"write": time.perf_counter() - started}
    return replace(done.report, seconds=seconds)
