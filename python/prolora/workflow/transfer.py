"""The main job: a LoRA of one base in, the LoRA of another base out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import adapters
from ..adapters.adapter import Adapter
from ..bases import Base, BaseLike, open_base
from ..core.precision import in_full_precision
from .by_weights.pipeline import Notes, list_inputs, transfer_by_weights
from .fit_options import FitOptions
from .options import (
    DEFAULT_OPTIONS,
    DtypeLike,
    FormatLike,
    LoraLike,
    OptionChanges,
    TransferOptions,
    read_dtype,
    settle_options,
    takes_options,
)
from .output_paths import check_output
from .report import Report
from .resume import Recipe

if TYPE_CHECKING:
    from typing_extensions import Unpack


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


@takes_options
def transfer(
    lora: LoraLike,
    source: BaseLike,
    target: BaseLike,
    options: TransferOptions = DEFAULT_OPTIONS,
    **changes: Unpack[OptionChanges],
) -> Transfer:
    """Turns a LoRA of one base model into the LoRA of another, without training and without data.

    Args:
        lora: a .safetensors file, a PEFT folder, a state dict or an `Adapter`.
        source: the base that the LoRA was trained on: a file, a folder, an id on the hub, a mapping
            name -> tensor, an nn.Module or an opened `Base`.
        target: the base to move to, in any of these forms.
        options: how to move it.
        **changes: options by name, in place of those.

    Returns:
        The LoRA of the target in memory, with the report.

    Raises:
        InvalidOption: an option has a value that it does not take.
        UnsupportedFormat: a file, key or adapter type that cannot be read exactly, or a result that
            `format` cannot hold.
        ShapeMismatch: an update or a pair of weights that does not fit.
        NonFiniteWeights: NaN or Inf, named. All of these before any SVD runs.
        WrongBase: the LoRA belongs to `target` and not to `source`, or the two are one model.
        AlreadyMoved: prolora moved the LoRA before, to another base than `source`.
        OutputError: out_rank is a size that one column a module exceeds.
        TooLittleMemory: max_memory is below what the largest weight needs.
        UnrelatedBases: method "auto", and the weights have nothing in common.
        LowCoverage: fewer modules moved than `min_coverage` asks for.
    """
    options = settle_options(options, changes)
    return run_transfer(lora, open_base(source), open_base(target), options)


@in_full_precision
def run_transfer(
    lora: LoraLike,
    source: Base,
    target: Base,
    options: TransferOptions,
    notes: Notes | None = None,
) -> Transfer:
    """Moves a LoRA, its bases opened.

    Raises:
        ProLoRAError: see `transfer`.
    """
    result = transfer_by_weights(lora, source, target, options, notes)
    return Transfer(result.adapter, result.report, list_inputs(lora, source, target))


@takes_options
def transfer_file(
    lora: str | PathLike[str],
    source: BaseLike,
    target: BaseLike,
    out: str | PathLike[str],
    options: TransferOptions = DEFAULT_OPTIONS,
    **changes: Unpack[OptionChanges],
) -> Report:
    """Moves a LoRA from file to file: `transfer`, then `Transfer.save`.

    The output path is checked before any work.

    Args:
        lora: a .safetensors file or a PEFT folder.
        source: the base that the LoRA was trained on, as `transfer` takes it.
        target: the base to move to, likewise.
        out: the file to write, or a folder for format "peft".
        options: how to move it.
        **changes: options by name, in place of those.

    Returns:
        What was kept and lost.

    Raises:
        ForeignFile: a file is there that prolora did not write.
        OutputError: out cannot be written, or is an input.
        ProLoRAError: everything that `transfer` raises.
    """
    options = settle_options(options, changes).for_file()
    return run_transfer_file(Path(lora), open_base(source), open_base(target), out, options)


def run_transfer_file(
    lora: Path,
    source: Base,
    target: Base,
    out: str | PathLike[str],
    options: TransferOptions,
) -> Report:
    """`transfer_file`, its options checked and its bases opened.

    Raises:
        OutputError: out cannot be written, or is an input.
        ProLoRAError: see `transfer`.
    """
    check_output(out, list_inputs(lora, source, target), options.overwrite)
    recipe = Recipe.of(lora, source, target, options)
    done = run_transfer(lora, source, target, options, recipe.describe)
    if options.progress:
        moved = len(done.adapter.updates)
        options.progress(moved, moved, f"writing {Path(out).name}")
    return save_result(done, Path(out), options)


def save_result(done: Transfer, out: Path, options: TransferOptions | FitOptions) -> Report:
    """Writes a result and returns its report, with the time that writing took."""
    started = time.perf_counter()
    format = options.format or "auto"
    done.save(out, format=format, dtype=options.dtype, overwrite=options.overwrite)
    seconds = done.report.seconds | {"write": time.perf_counter() - started}
    return replace(done.report, seconds=seconds)
