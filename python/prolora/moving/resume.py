"""What a result was made of and how, in its own header: a run that was cut off goes on there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from ..adapters import read_adapter
from ..adapters.contents import parse_contents
from ..adapters.lora import Lora
from ..bases import Base
from ..comparison.module_map import Matching
from ..core.option_fields import read_shown
from ..errors import ProLoRAError
from ..files.hashing import hash_file
from ..files.hub import keep_path
from ..reports.lora_report import MovedReport
from ..reports.report import MADE_BEFORE, VERDICT
from ..version import __version__
from .options import LoraLike
from .output_paths import check_name, check_output
from .result import Notes, Transfer, list_inputs, save_result

States = list[list[str | int]]
BaseName = str | States


@dataclass(frozen=True)
class Recipe:
    """What determines a result: equal for equal inputs, options and version, and else different.

    A result at a path of the caller's names its bases by their files' sizes and times, so that a
    plain transfer reads no base for it: where a base was touched, the result is not known again.
    A result whose name is made of its recipe names them by the digests of all their bytes.

    Attributes:
        lora: a file or folder.
        source: the base it was trained on.
        target: the base it moves to.
        options: as they were asked for.
        lora_hash: "sha256:…" of the LoRA.
        bases: how the header names source and target.
    """

    lora: Lora
    source: Base
    target: Base
    options: Any  # a dataclass of options
    lora_hash: str
    bases: tuple[BaseName, ...]

    @classmethod
    def of(
        cls,
        lora: Lora | Path,
        source: Base,
        target: Base,
        options: Any,
        digests: tuple[str, ...] | None = None,
    ) -> Recipe:
        """Returns the recipe of a LoRA that is not yet read.

        Args:
            lora: a file or folder; what is open already stays so.
            source: the base it was trained on.
            target: the base it moves to.
            options: as they were asked for.
            digests: of the bases, where a name is made of the recipe.

        Raises:
            UnsupportedFormat: the LoRA cannot be read.
        """
        opened = Lora.open(lora)
        lora_hash = f"sha256:{opened.digest}"
        if opened is not lora:
            opened.close()
        names: tuple[BaseName, ...] = digests or (
            _list_states(source.files),
            _list_states(target.files),
        )
        return cls(opened, source, target, options, lora_hash, names)

    @property
    def facts(self) -> dict[str, Any]:
        """What a result is made of, as JSON can hold it; the options are those that count."""
        chosen = {
            field.name: _jsonable(getattr(self.options, field.name))
            for field in fields(self.options)
            if read_shown(field).decides and getattr(self.options, field.name) != field.default
        }
        return {"options": chosen, "source": self.bases[0], "target": self.bases[1]}

    @property
    def made_of(self) -> list[Any]:
        """All that the bytes of a result follow from."""
        return [__version__, self.lora_hash, self.facts]

    def describe(self) -> dict[str, str]:
        """Returns the two entries of a result's header."""
        return {"lora_hash": self.lora_hash, "recipe": json.dumps(self.facts, sort_keys=True)}

    def is_made(self, out: Path) -> bool:
        """Returns whether `out` is a result of this recipe, by its header."""
        if not (os.path.exists(out) and self.source.files and self.target.files):
            return False  # bases in memory cannot be known again
        try:
            with Lora.open(out) as result:
                if parse_contents(result).left_out:
                    return False  # it is damaged: a result has nothing that is not read
                metadata = result.metadata
            told = json.loads(metadata.get("prolora.recipe", ""))
        except (ProLoRAError, ValueError, RecursionError):
            return False
        made = metadata.get("prolora.lora_hash"), metadata.get("prolora.version")
        return made == (self.lora_hash, __version__) and told == json.loads(json.dumps(self.facts))


def make_file(
    ends: tuple[LoraLike, Base, Base],
    out: str | PathLike[str],
    ways: Sequence[Any],
    plan: Callable[[Lora], MovedReport],
    make: Callable[[LoraLike, list[Notes | None]], Transfer],
) -> Transfer:
    """Makes a result at a path; one of the same recipe is kept, and its verdict told again.

    Args:
        ends: the LoRA and both bases.
        out: where it is written.
        ways: the options of each way in which it may have been made.
        plan: reports what a kept result is, from headers.
        make: makes it; called with the LoRA, and for each way with what its header says of that.
    """
    lora, *bases = ends
    check_name(out)
    path, options = Path(out), ways[0]
    if not isinstance(lora, str | PathLike):  # in memory, of which no recipe is kept
        check_output(path, list_inputs(lora, *bases), options.overwrite, options.format)
        return save_result(make(lora, [None for _ in ways]), path, options.overwrite)
    with Lora.open(keep_path(lora)) as file:
        recipes = [Recipe.of(file, *ends[1:], way) for way in ways]
        if not options.overwrite and any(recipe.is_made(path) for recipe in recipes):
            made = read_adapter(out)
            return Transfer(made, replace(plan(file), before=read_verdict(made.metadata)))
        check_output(path, list_inputs(file, *bases), options.overwrite, options.format)
        done = make(file, [recipe.describe for recipe in recipes])
        if options.progress:
            moved = len(done.adapter.updates)
            options.progress(moved, moved, f"writing {path.name}")
        return save_result(done, path, options.overwrite)


def read_verdict(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Reads the verdict in a result's header."""
    try:
        words = json.loads(metadata[VERDICT])["words"]
    except (KeyError, TypeError, ValueError, RecursionError):
        words = []
    told = isinstance(words, list) and all(isinstance(line, str) for line in words)
    return tuple(words) if words and told else (MADE_BEFORE,)


def _list_states(files: Iterable[Path]) -> States:
    """Lists name, size and time of each file of a base."""
    states = [(file.name, file.stat()) for file in sorted(files)]
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


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
