"""What the nodes do with prolora: paths in, paths and a report out."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

import prolora
from prolora.bases.cache.basis_cache import default_folder

from . import words

AUTO = "auto"
BEST = "best"
METHODS = (AUTO, BEST, *prolora.METHODS)
FORMATS = {"ComfyUI": "comfyui", "as it came": AUTO, "kohya": "kohya", "diffusers": "diffusers"}
MOVED = "zz-moved"
"""The folder of results, which comes last in ComfyUI's lists."""

_AGAIN = "-again"  # ends the name of what is written while a link to its LoRA has the usual one
_MOST_BYTES = 100
# The bytes of a model that trainers hash for the header of a LoRA.
_HASHED_START, _HASHED_SIZE = 0x100000, 0x10000

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Place:
    """Where the results of one target go, and what they are called."""

    root: Path  # ComfyUI's folder of LoRAs
    target: str  # its name below ComfyUI's folder of such models

    @property
    def folder(self) -> Path:
        """The folder: all parts of the target's name that tell something."""
        plain = make_plain(words.shorten(self.target).replace("/", "-"))
        return self.root / MOVED / (plain or "target")

    def name(self, lora: str, label: str, digest: str) -> Path:
        """A result's path below `folder`: in folders as the LoRA is, what tells most first."""
        inside = Path(lora)
        parts = (make_plain(inside.stem), label, digest)
        return inside.with_name("-".join(part for part in parts if part))


@dataclass(frozen=True)
class Moved:
    """What became of a LoRA."""

    path: Path  # of the result
    told: Any = None  # the verdict; of a LoRA that was moved before, that of the first time
    error: str | None = None  # why it could not be moved, in a sentence

    @property
    def page(self) -> Path | None:
        """The whole report, beside the file."""
        page = self.path.with_suffix(".html")
        return page if page.exists() else None


def make_plain(text: str) -> str:
    """A text as every file system takes it for a part of a name."""
    plain = re.sub(r"[^\w.+-]+", "_", re.sub(r"['’]", "", text)).strip("._")
    return plain.encode()[-_MOST_BYTES:].decode(errors="ignore")


@dataclass(frozen=True)
class Settings:
    """How LoRAs are moved, as the widgets say it; the first choice of each is the usual one."""

    method: str = AUTO
    rank: str = next(iter(words.RANKS))
    format: str = next(iter(FORMATS))
    style: str = next(iter(words.STYLES))
    prompts: str = ""  # one a line

    def options(self) -> dict[str, Any]:
        """Options of `prolora.transfer_many`."""
        return {
            "method": self.method,
            "out_rank": words.RANKS[self.rank],
            "format": FORMATS[self.format],
        } | self._fit_options()

    def _fit_options(self) -> dict[str, Any]:
        """Options of the method “best”; the others take none of them."""
        if self.method != BEST:
            return {}
        lines = (line.strip() for line in self.prompts.splitlines())
        return {"prompts": tuple(filter(None, lines)), "look": words.STYLES[self.style]}

    def label(self) -> str:
        """The unusual settings, as a name holds them."""
        usual = Settings()
        told = [
            self.method if self.method != usual.method else "",
            f"rank {self.rank}" if self.rank != usual.rank else "",
            self.format if self.format != usual.format else "",
            self.style if self._fit_options() and self.style != usual.style else "",
        ]
        return make_plain("-".join(word for word in told if word))


def find_trained_on(lora: Path, bases: Mapping[str, Path]) -> str | None:
    """The name of the base that a LoRA's header tells of, by its hash or by its name."""
    try:
        with safe_open(lora, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return None  # moving it says why
    wanted = metadata.get("ss_sd_model_hash", "").lower()
    told = _name_alone(metadata.get("ss_sd_model_name", ""))
    named = [
        name
        for name in bases
        if told not in ("", *words.GENERIC_NAMES) and _name_alone(name) == told
    ]
    hashed = (name for name, path in bases.items() if wanted and _hash_start(path) == wanted)
    return next(hashed, None) or next(iter(named), None)


def _name_alone(model: str) -> str:
    return words.strip_ending(PureWindowsPath(model).name).lower()


def _hash_start(path: Path) -> str:
    """The eight digits by which trainers name a model; "" if it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(_HASHED_START)
            hashed = file.read(_HASHED_SIZE)
            return hashlib.sha256(hashed).hexdigest()[:8] if hashed else ""
    except OSError:
        return ""


def move_loras(
    loras: Mapping[str, Path],
    source: Path,
    target: Path,
    place: Place,
    settings: Settings,
    progress: Progress,
    linked: bool,
) -> list[Moved]:
    """Moves LoRAs to where they belong; what is there already, made so, is left alone.

    Args:
        loras: files by their names in ComfyUI's list.
        source: the base that they were trained on.
        target: the base that they move to.
        place: where the results go.
        settings: as the widgets have them.
        progress: called as progress(done, total, name); what it raises ends the job.
        linked: whether a result that equals its LoRA is a link to it; else the LoRA is the result.

    Raises:
        Refusal: the two bases cannot be used.
    """
    names = {path: name for name, path in loras.items()}
    shown = names | {source: "“trained on”", target: "“use on”", place.root: "loras"}

    def naming(lora: Path, digest: str) -> str:
        path = place.name(names[lora], settings.label(), digest)
        result = place.folder / path.with_name(f"{path.name}.safetensors")
        # A link of `_spare` stays: Windows removes no file that ComfyUI has loaded.
        linked_before = result.is_file() and result.samefile(lora)
        return f"{path}{_AGAIN}" if linked_before else str(path)

    try:
        options = settings.options() | {"cache": default_folder(), "progress": progress}
        may_fit = settings.method == BEST
        # ComfyUI's models stay on the card, where a fit needs room of its own.
        options["device"] = AUTO if may_fit else "cpu"
        if options["format"] == "comfyui" and prolora.open_base(target).family is None:
            options["format"] = AUTO  # of an unknown family, ComfyUI reads what it read before
        # ComfyUI computes without gradients, which a fit needs.
        with torch.inference_mode(False), torch.set_grad_enabled(may_fit):
            moved = prolora.transfer_many(
                names, source, target, place.folder, naming=naming, **options
            )
        fits = may_fit and source.is_dir() and target.is_dir()
        return [_finish(outcome, shown, linked, fits) for outcome in moved]
    except prolora.ProLoRAError as error:
        raise words.Refusal(words.explain(error, names=shown)) from None
    finally:
        results = place.root / MOVED
        for folder in sorted([results, *results.rglob("*")], reverse=True):  # the innermost first
            if folder.is_dir() and not (folder.is_symlink() or any(folder.iterdir())):
                folder.rmdir()


def read_state(path: Path) -> list[tuple[str, int, int, int, int]]:
    """Name, inode, size and times of a file, or of the weights in a folder."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    known = ((str(file), file.stat()) for file in files)
    return [(n, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for n, s in known]


def _finish(
    outcome: prolora.Outcome, names: Mapping[Path, str], linked: bool, in_fit: bool = False
) -> Moved:
    """Writes the page of a report beside the file."""
    if outcome.error is not None:
        return Moved(outcome.out, error=words.explain(outcome.error, in_fit, names))
    if outcome.report is not None and not outcome.kept:
        outcome.report.save(outcome.out.with_suffix(".html"), overwrite=True, spell=words.say)
    path = outcome.out
    if path.is_file() and holds_the_same(outcome.lora, path):
        path = _spare(outcome.lora, path, linked)
    return Moved(path, outcome.words)


def holds_the_same(one: Path, other: Path) -> bool:
    """Whether two LoRA files hold equal tensors under equal names."""
    try:
        first, second = load_file(one), load_file(other)
    except (OSError, SafetensorError):
        return False
    return first.keys() == second.keys() and all(
        x.dtype == second[name].dtype and torch.equal(x, second[name]) for name, x in first.items()
    )


def _spare(original: Path, result: Path, linked: bool) -> Path:
    """Makes a result that equals its original a link to it, or removes it."""
    usual = result.with_stem(result.stem.removesuffix(_AGAIN))
    if linked and usual == result:
        link = result.with_name(f".{result.name}.link")
        try:
            os.link(original, link)
            os.replace(link, result)
        except OSError:
            link.unlink(missing_ok=True)
        return result
    for path in (result, result.with_suffix(".html")):
        path.unlink(missing_ok=True)
    return usual if linked else original


def merge(loras: Mapping[str, Path], strengths: Sequence[float], method: str, root: Path) -> Moved:
    """Merges LoRAs into one below the folder of results."""
    made_of = f"{method} {strengths} {[read_state(path) for path in loras.values()]}"
    names = "+".join(make_plain(Path(name).stem) for name in loras)
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    out = root / MOVED / "merged" / f"{names[:_MOST_BYTES]}-{digest}.safetensors"
    shown = {path: name for name, path in loras.items()}
    try:
        options = {"method": method, "strengths": tuple(strengths)}
        unwritten = None if out.is_file() else out  # Windows replaces no file that is loaded
        report = prolora.merge([*loras.values()], out=unwritten, **options).report
        report.save(out.with_suffix(".html"), overwrite=True, spell=words.say)
    except prolora.ProLoRAError as error:
        raise words.Refusal(words.explain(error, names=shown)) from None
    return Moved(out, report.in_words())


def check(lora: Path, base: Path | None) -> str:
    """Says what `prolora check` says of a LoRA in ComfyUI."""
    try:
        found = prolora.check(lora, base=base, program="comfyui")
    except prolora.ProLoRAError as error:
        names = {path: path.name for path in (lora, base) if path}
        raise words.Refusal(words.explain(error, names=names)) from None
    return "\n".join(map(words.say, str(found).split("\n")))


def advise(source: Path, target: Path, lora: Path, progress: Progress) -> str:
    """What a LoRA of one base would give on another, by their weights."""
    try:
        found = prolora.check(
            lora, source=source, target=target, cache=default_folder(), progress=progress
        )
    except prolora.ProLoRAError as error:
        names = {lora: lora.name, source: "“trained on”", target: "“use on”"}
        raise words.Refusal(words.explain(error, names=names)) from None
    return "\n".join(map(words.say, str(found.move).split("\n")))
