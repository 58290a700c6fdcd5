"""What a result was made of and how, in its own header: a run that was cut off goes on there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import adapters
from ..adapters import read_adapter
from ..adapters.adapter import Adapter
from ..adapters.contents import parse_contents
from ..adapters.formats.moves import read_provenance
from ..adapters.lora import Lora
from ..bases import Base
from ..comparison.module_map import Matching
from ..core.option_fields import read_shown
from ..errors import ProLoRAError
from ..files.hashing import hash_file
from ..files.hub import keep_path
from ..files.store import replace_surrogates
from ..reports.lora_report import LoraReport, MovedReport
from ..reports.report import MADE_BEFORE, VERDICT
from ..version import __version__
from .options import DtypeLike, FormatLike, LoraLike, read_dtype
from .output_paths import check_name, check_output

Notes = Mapping[str, str]
"""What the header of a result says of its making."""


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


@dataclass(frozen=True)
class Recipe:
    """What determines a result: equal for equal inputs, options and version, and else different.

    A result at a path of the caller's names its bases by their files' sizes and times, so that a
    plain transfer reads no base for it: where a base was touched, the result is not known again.
    A result whose name is made of its recipe names them by the digests of all their bytes.
    """

    lora: Lora  # a file or folder
    lora_hash: str  # "sha256:…"
    facts: dict[str, Any]  # how the header names options and bases, as JSON can hold it

    @classmethod
    def of(
        cls,
        lora: Lora | Path,
        source: Base,
        target: Base,
        options: Any,
        digests: tuple[str, ...] | None = None,
    ) -> Recipe:
        """Returns the recipe of a LoRA that is not yet read; what is open already stays so.

        `digests` name the bases where a path is made of the recipe.
        """
        opened = Lora.open(lora)
        lora_hash = f"sha256:{opened.digest}"
        if opened is not lora:
            opened.close()
        names = digests or [
            [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(base.files)]
            for base in (source, target)
        ]
        chosen = {
            field.name: _jsonable(getattr(options, field.name))
            for field in fields(options)
            if read_shown(field).decides and getattr(options, field.name) != field.default
        }
        facts = {"options": chosen, "source": names[0], "target": names[1]}
        return cls(opened, lora_hash, facts)

    @property
    def made_of(self) -> list[Any]:
        """All that the bytes of a result follow from."""
        return [__version__, self.lora_hash, self.facts]

    def describe(self) -> dict[str, str]:
        """Returns the two entries of a result's header."""
        return {"lora_hash": self.lora_hash, "recipe": json.dumps(self.facts, sort_keys=True)}


def _read_made(recipes: Sequence[Recipe], out: Path) -> Adapter | None:
    """Reads a result of one of some recipes, by its header; None for anything else."""
    if not os.path.exists(out):
        return None
    try:
        with Lora.open(out) as result:
            header = result.metadata
            told = json.loads(header.get("prolora.recipe", ""))
            made = [header.get("prolora.version"), header.get("prolora.lora_hash"), told]
            known = made in (json.loads(json.dumps(recipe.made_of)) for recipe in recipes)
            # It is damaged where something is not read: a result has nothing of that kind.
            return read_adapter(result) if known and not parse_contents(result).left_out else None
    except (ProLoRAError, ValueError, RecursionError):
        return None


def make_file(
    ends: tuple[LoraLike, Base, Base],
    out: str | PathLike[str],
    ways: Sequence[Any],
    plan: Callable[[Lora], MovedReport],
    make: Callable[[LoraLike, list[Notes]], Transfer],
) -> Transfer:
    """Makes a result at a path; one of the same recipe is kept, and its verdict told again.

    `ends` are the LoRA and both bases; `ways` the options of each way in which it may be made;
    `plan` reports what a kept result is, from headers; `make` is called with the LoRA, and for each
    way with what the header says of that.
    """
    lora, *bases = ends
    check_name(out)
    path, options = Path(out), ways[0]
    if not isinstance(lora, str | PathLike):  # in memory, of which no recipe is kept
        check_output(path, list_inputs(lora, *bases), options.overwrite, options.format)
        return save_result(make(lora, [{} for _ in ways]), path, options.overwrite)
    with Lora.open(keep_path(lora)) as file:
        recipes = [Recipe.of(file, *ends[1:], way) for way in ways]
        known_again = all(base.files for base in bases) and not options.overwrite
        if known_again and (made := _read_made(recipes, path)):
            origin, before = read_provenance(made.metadata), read_verdict(made.metadata)
            report = plan(file)
            method = origin.get("method", report.method)
            report = replace(report, method=method, provenance=origin, before=before)
            return Transfer(made, report)
        check_output(path, list_inputs(file, *bases), options.overwrite, options.format)
        done = make(file, [recipe.describe() for recipe in recipes])
        moved = len(done.adapter.updates)
        options.tell(moved, moved, f"writing {path.name}")
        return save_result(done, path, options.overwrite)


def read_verdict(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Reads the verdict in a result's header."""
    try:
        words = json.loads(metadata[VERDICT])["words"]
    except (KeyError, TypeError, ValueError, RecursionError):
        words = []
    told = isinstance(words, list) and all(isinstance(line, str) for line in words)
    return tuple(words) if words and told else (MADE_BEFORE,)


def _jsonable(value: Any) -> Any:
    """Converts an option for JSON."""
    if isinstance(value, Matching):
        return "similarity"  # which the two bases determine
    if isinstance(value, Mapping):
        pairs = {str(key): _jsonable(item) for key, item in value.items()}
        # In block weights the last name that fits decides; in a map the order means nothing.
        return pairs if all(isinstance(x, str) for x in pairs.values()) else list(pairs.items())
    if isinstance(value, PathLike) or (isinstance(value, str) and value.endswith(".json")):
        return hash_file(Path(value)) if os.path.isfile(value) else str(value)
    return value if isinstance(value, str | int | float | None) else repr(value)
