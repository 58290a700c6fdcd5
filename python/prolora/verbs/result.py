"""What a result was made of and how, in its own header: a run that was cut off goes on there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from .. import adapters
from ..adapters import read_adapter
from ..adapters.adapter import Adapter
from ..adapters.formats.moves import PREFIX, read_provenance
from ..adapters.lora import Lora
from ..adapters.writing import TENSORS
from ..bases import Base
from ..bases.identity import describe_reads, is_unchanged, name_base, record_reads
from ..bases.leaves import is_settled, open_memory, save_memory
from ..comparison.module_map import Matching
from ..core.arrays import to_kind_of
from ..core.methods import Method, find_method
from ..errors import OutputError, OutputExists, ProLoRAError, is_disk_full
from ..files.hashing import hash_file, hash_tensors, hash_text
from ..files.hub import keep_path
from ..files.state import read_state
from ..files.store import replace_surrogates
from ..reports.lora_report import LoraReport, MovedReport
from ..reports.report import MADE_BEFORE, VERDICT
from ..version import __version__
from .option_fields import read_shown
from .options import DtypeLike, FormatLike, LoraLike, read_dtype
from .output_paths import check_name, check_output

Standing = Literal["current", "stale", "other"]
"""Whether a path has what would be made now, what was before a change, or something else."""
SIDES = "source", "target"
"""What a recipe calls the two bases."""


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
            Key -> tensor on the CPU, or array of the LoRA's kind: factors [out, r] and [r, in], of
            convolutions [out, r, 1, 1] and [r, in, kh, kw]; the scale is 1 for every loader.

        Raises:
            UnsupportedFormat: the format has no name for a module.
            NonFiniteWeights: a factor overflows in dtype.
            OutputError: no module is left in the adapter.
        """
        tensors = adapters.encode_state_dict(
            self.adapter, format=format or self.format, dtype=read_dtype(dtype or self.dtype)
        )
        return {key: to_kind_of(x, self.adapter.foreign) for key, x in tensors.items()}

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
    verdict = json.dumps({"words": words.split("\n"), "share": share})
    metadata = done.adapter.metadata | {VERDICT: replace_surrogates(verdict)}
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


def as_dry_run(report: LoraReport) -> Transfer:
    """Returns what a dry run gives: a report, and no update."""
    return Transfer(Adapter({}), report)


@dataclass(frozen=True)
class Recipe:
    """What determines a result: equal inputs, options and version give an equal one.

    Bases count by digests of what is read of them: headers, tensors, and for a fit all files of
    both pipelines.
    """

    lora: Lora  # a file or folder
    source: Base
    target: Base
    options: Any
    memory: Path | None = None  # a folder that remembers digests between runs
    # Digests of all that both bases are; None where only the tensors count that are read of them
    digest_bases: Callable[[], dict[str, Any]] | None = None

    @cached_property
    def lora_hash(self) -> str:
        """The digest of the LoRA's file."""
        if self.memory is None:
            return f"sha256:{self.lora.digest}"
        return self._recall(self.lora, "lora", lambda: f"sha256:{self.lora.digest}")

    @property
    def chosen(self) -> dict[str, Any]:
        """The options that determine the result, as JSON holds them."""
        chosen = {
            field.name: _jsonable(getattr(self.options, field.name))
            for field in fields(self.options)
            if read_shown(field).decides and getattr(self.options, field.name) != field.default
        }
        return dict(json.loads(json.dumps(chosen)))

    @property
    def made_of(self) -> list[Any]:
        """What results are named by: LoRA, version, options, and `name_base` of both bases."""
        bases = [name_base(self.source), name_base(self.target)]
        return [__version__, self.lora_hash, self.chosen, *bases]

    def make(self, make: Callable[[Lora], Transfer]) -> Transfer:
        """Makes a result, and notes in its header what it is made of."""
        bases = self.source, self.target
        leaves = (*self.source.leaves, *self.target.leaves) if self.digest_bases is None else ()
        for one in leaves:
            one.remember(self.memory)
        with record_reads(*bases) as used:
            done = make(self.lora)
        if self.digest_bases is None:
            reads: dict[str, Any] = dict(zip(SIDES, map(describe_reads, bases, used), strict=True))
        else:
            reads = self.digest_bases()
        for one in leaves if self.memory is not None else ():
            one.save()
        recipe = json.dumps({"options": self.chosen, **reads}, sort_keys=True)
        noted = {f"{PREFIX}lora_hash": self.lora_hash, f"{PREFIX}recipe": recipe}
        adapter = replace(done.adapter, metadata=done.adapter.metadata | noted)
        report = replace(done.report, provenance=read_provenance(adapter.metadata))
        return replace(done, adapter=adapter, report=report)

    def judge(self, out: Path, *, verify: bool = True) -> Standing:
        """Returns how a path stands to the result that would be made now.

        All that was read of the bases must be as it was, and so must the result's own tensors. With
        `verify` these are read, and otherwise only where the state of its file is another.
        """
        standing: Standing = "other"
        if not isinstance(getattr(self.options, "method", ""), str):
            return standing  # a method of one's own has no digest
        with suppress(ProLoRAError, RecursionError, ValueError), Lora.open(out) as result:
            before = [result.metadata.get(f"{PREFIX}{key}") for key in ("version", "lora_hash")]
            noted = json.loads(result.metadata.get(f"{PREFIX}recipe", ""))
            if before == [__version__, self.lora_hash] and noted.get("options") == self.chosen:
                standing = "stale"
                if self._is_unchanged(noted) and self._is_whole(result, verify):
                    standing = "current"
        return standing

    def _is_unchanged(self, noted: Mapping[str, Any]) -> bool:
        """Returns whether the bases are as a result notes them."""
        if self.digest_bases is not None:
            return all(noted.get(side) == what for side, what in self.digest_bases().items())
        bases = self.source, self.target
        for leaves in (*self.source.leaves, *self.target.leaves):
            leaves.remember(self.memory)
        return all(map(is_unchanged, bases, map(noted.get, SIDES)))

    def _is_whole(self, result: Lora, verify: bool) -> bool:
        """Returns whether a result has its own tensors."""

        def digest() -> str:
            beside = json.dumps(result.config, sort_keys=True)
            return hash_tensors(result.tensors, result.read, beside)

        recorded = digest() if verify else self._recall(result, TENSORS, digest)
        return recorded == result.metadata.get(TENSORS)

    def remember_result(self, out: Path) -> None:
        """Remembers the file of a result that was written just now."""
        with Lora.open(out) as result:
            self._recall(result, TENSORS, lambda: result.metadata[TENSORS], is_new=True)

    def _recall(
        self, lora: Lora, what: str, compute: Callable[[], str], *, is_new: bool = False
    ) -> str:
        """Returns a digest of a LoRA's file, computed once for each of its states."""
        if lora.file is None:
            return compute()
        entry = f"{what} {json.dumps(lora.config, sort_keys=True)}"
        state = read_state(lora.file.path)
        if not state.has_content_of(lora.file.state):  # replaced since it was opened
            return compute()
        memory = open_memory(lora.file.path, state, self.memory)
        if (recorded := memory.get(entry)) is None:
            recorded = compute()
            if is_new or is_settled(state):
                memory.put(entry, recorded)
                save_memory(memory)
        return str(recorded)


def write_or_keep(
    recipe: tuple[LoraLike, Base, Base, Any],
    out: str | PathLike[str],
    plan: Callable[[Lora], MovedReport],
    make: Callable[[LoraLike], Transfer],
    *,
    digest_bases: Callable[[], dict[str, Any]] | None = None,
    renews: bool = False,
    make_room: Callable[[], bool] | None = None,
) -> Transfer:
    """Makes a result at a path; a current one is kept, and its verdict reported again.

    Args:
        recipe: the LoRA, both bases and the options.
        out: the path.
        plan: reports what a kept result is, from headers.
        make: is called with the LoRA.
        digest_bases: as in a `Recipe`.
        renews: replace a result of this recipe that is not current: its path is named by that.
        make_room: removes what was written beside the result, if the disk is full; returns whether
            it removed anything.
    """
    lora, source, target, options = recipe
    check_name(out)
    path, overwrite = Path(out), options.overwrite
    if not isinstance(lora, str | PathLike):  # in memory, of which no recipe is kept
        check_output(path, list_inputs(lora, source, target), overwrite, options.format)
        return save_result(make(lora), path, overwrite)
    with Lora.open(keep_path(lora)) as file:
        memory = None if options.cache is None else Path(options.cache)
        whole = Recipe(file, source, target, options, memory, digest_bases)
        if source.files and target.files and not overwrite and os.path.exists(path):
            if (standing := whole.judge(path)) == "current":
                return _report_kept(read_adapter(path), plan(file))
            overwrite = renews and standing == "stale"
        try:
            check_output(path, list_inputs(file, source, target), overwrite, options.format)
            done = whole.make(make)
            moved = len(done.adapter.updates)
            options.report_progress(moved, moved, f"writing {path.name}")
            try:
                return save_result(done, path, overwrite)
            except OutputError as error:
                if not (make_room and is_disk_full(error) and make_room()):
                    raise
                return save_result(done, path, overwrite)
        except OutputExists:  # perhaps another process has made the same meanwhile
            known = source.files and target.files and not overwrite
            if not known or whole.judge(path) != "current":
                raise
            return _report_kept(read_adapter(path), plan(file))


def _report_kept(result: Adapter, report: MovedReport) -> Transfer:
    """Reports a kept result as its header does."""
    origin, before = read_provenance(result.metadata), read_verdict(result.metadata)
    method = origin.get("method", report.method)
    return Transfer(result, replace(report, method=method, provenance=origin, before=before))


def read_verdict(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Reads the verdict in a result's header."""
    try:
        words = json.loads(metadata[VERDICT])["words"]
    except (KeyError, TypeError, ValueError, RecursionError):
        words = []
    is_text = isinstance(words, list) and all(isinstance(line, str) for line in words)
    return tuple(words) if words and is_text else (MADE_BEFORE,)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Matching):
        return "similarity"  # which the two bases determine
    if isinstance(value, Method) or callable(value):
        return find_method(value).name
    if isinstance(value, Mapping):
        pairs = {str(key): _jsonable(item) for key, item in value.items()}
        # In block weights the last name that fits decides; in a map the order means nothing.
        return pairs if all(isinstance(x, str) for x in pairs.values()) else list(pairs.items())
    if isinstance(value, PathLike) and os.path.isdir(value):  # of pictures, whose contents decide
        files = sorted(filter(Path.is_file, Path(value).iterdir()), key=str)  # as on any system
        return hash_text("\n".join(f"{path.name} {hash_file(path)}" for path in files))
    if isinstance(value, PathLike) or (isinstance(value, str) and value.endswith(".json")):
        return hash_file(Path(value)) if os.path.isfile(value) else str(value)
    return value if isinstance(value, str | int | float | None) else repr(value)
