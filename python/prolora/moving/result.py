"""A finished transfer, in memory, and how it becomes a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import adapters
from ..adapters.adapter import Adapter
from ..adapters.lora import Lora
from ..bases import Base
from ..files.store import replace_surrogates
from ..reports.lora_report import LoraReport
from ..reports.report import VERDICT
from .options import DtypeLike, FormatLike, LoraLike, read_dtype
from .output_paths import check_output

Notes = Callable[[], Mapping[str, str]]
"""What the header of a result says of its making; asked once the LoRA has been read."""


@dataclass(frozen=True, repr=False)
class Transfer:
    """A finished transfer, in memory.

    Attributes:
        adapter: the LoRA of the target.
        report: what was kept and lost.
        inputs: the files that it was made of, which `save` does not overwrite.
        format: that was asked for, in which `save` writes it if none is asked there; "auto" is the
            one that the LoRA came in.
        dtype: of the factors, likewise; None is the LoRA's.
    """

    adapter: Adapter
    report: LoraReport
    inputs: list[Path] = field(default_factory=list)
    format: FormatLike = "auto"
    dtype: DtypeLike | None = None

    def __repr__(self) -> str:
        """Returns one line: the LoRA and what became of its modules."""
        return f"Transfer({self.adapter!r}, {self.report!r})"

    def save(
        self,
        path: str | PathLike[str],
        *,
        format: FormatLike | None = None,
        dtype: DtypeLike | None = None,
        overwrite: bool = False,
    ) -> None:
        """Writes the LoRA: to a temporary file, read back and compared, then renamed.

        Args:
            path: a .safetensors file, or a folder for `format="peft"`.
            format: "auto" (as it came in), "kohya", "diffusers", "peft" or "comfy"; or the
                program that reads the file: "comfyui", "a1111", "forge", "invokeai", …. None means
                as it was asked for when the result was made.
            dtype: of the factors, "float16", "bfloat16", "float32" or "float64"; None likewise.
            overwrite: replace what has that name.

        Raises:
            OutputExists: something has that name.
            OutputError: the path cannot be written, or is one of the inputs.
            NonFiniteWeights: a factor overflows in dtype.
            UnsupportedFormat: the format has no name for a module.
        """
        format = format or self.format
        written = self.adapter.format if format == "auto" else format
        check_output(path, self.inputs, overwrite, written)
        adapters.write_adapter(
            self.adapter,
            path,
            format=format,
            dtype=read_dtype(dtype or self.dtype),
            overwrite=overwrite,
        )

    def state_dict(
        self, format: FormatLike | None = None, *, dtype: DtypeLike | None = None
    ) -> dict[str, Tensor]:
        """Returns the tensors of the file that `save` writes, without a file.

        `pipe.load_lora_weights(done.state_dict("diffusers"))` loads the LoRA into a diffusers
        pipeline of the target.

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
        return adapters.encode_state_dict(
            self.adapter, format=format or self.format, dtype=read_dtype(dtype or self.dtype)
        )

    def peft_config(self) -> dict[str, Any]:
        """Returns the keywords of a `peft.LoraConfig` for `state_dict("peft")`, scale 1.

        Raises:
            UnsupportedFormat: PEFT has no name for a module, or the adapter has several models.
        """
        return adapters.describe_peft_config(self.adapter)


def save_result(done: Transfer, out: Path, overwrite: bool) -> Transfer:
    """Writes a result with its verdict, and returns it with the time of writing."""
    started = time.perf_counter()
    words, share = str(done.report.in_words()), done.report.totals["energy_mapped"]
    told = json.dumps({"words": words.split("\n"), "share": share})
    metadata = done.adapter.metadata | {VERDICT: replace_surrogates(told)}
    done = replace(done, adapter=replace(done.adapter, metadata=metadata))
    done.save(out, overwrite=overwrite)
    seconds = done.report.seconds | {"write": time.perf_counter() - started}
    return replace(done, report=replace(done.report, seconds=seconds))


def list_inputs(lora: LoraLike | None, *bases: Base) -> list[Path]:
    """Lists the files and folders that the LoRA and the bases come from."""
    if isinstance(lora, str | PathLike):
        lora = Lora.open(lora)
    there = [lora.location] if isinstance(lora, Lora) and lora.location else []
    return [*there, *(path for base in bases for path in base.files)]


def pack_plan(report: LoraReport) -> Transfer:
    """Returns what a dry run gives: a report, and no update."""
    return Transfer(Adapter({}), report)
