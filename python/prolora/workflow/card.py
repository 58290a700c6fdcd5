"""A model card: the README.md of a repository on the Hugging Face Hub that holds moved LoRAs.

Texts of others (names, trigger words, licences) stand in it as data: quoted in the YAML, escaped in
the Markdown.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters.folder import PEFT_WEIGHTS
from ..adapters.formats.moves import Move
from ..adapters.unread import open_adapter
from ..files.hashing import hash_file
from ..files.ownership import make_mark
from ..files.writing import write_text_atomically
from ..version import __version__
from .inspection import Description, inspect
from .outcome import Outcome
from .output_paths import check_beside
from .page.markup import replace_controls
from .report import Report

CARD = "README.md"
MARK = "<!-- written by prolora"
"""What every card begins with below its front matter, also one that its author has edited."""

_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # as the Hub lists them: "apache-2.0"


@dataclass(frozen=True)
class _CardEntry:
    """A LoRA that was written.

    Attributes:
        outcome: what became of it.
        report: what was kept and lost; None where it was there already.
        file: as its header describes it.
        header: the metadata of the file.
        digest: SHA-256 of the file.
    """

    outcome: Outcome
    report: Report | None
    file: Description
    header: dict[str, str]
    digest: str

    @classmethod
    def of(cls, outcome: Outcome) -> _CardEntry:
        out = outcome.out
        weights = out / PEFT_WEIGHTS if out.is_dir() else out
        header = open_adapter(out).metadata
        return cls(outcome, outcome.report, inspect(out), header, hash_file(weights))

    @property
    def move(self) -> Move:
        """From which base to which, by the header."""
        return self.file.moves[-1] if self.file.moves else Move()


def place_card(out: Path, in_folder: bool) -> Path:
    """Where the card of a run stands: in the folder of its results, or beside the one file.

    Args:
        out: of the run.
        in_folder: whether `out` is a folder, of several LoRAs or of a PEFT adapter.
    """
    return (out if in_folder else out.parent) / CARD


def write_card(
    card: Path, outcomes: Iterable[Outcome], command: str, overwrite: bool = False
) -> None:
    """Writes the card of all results; nothing where none is new.

    Args:
        card: as `place_card` gives it.
        outcomes: of the run; those that failed are left out.
        command: the command line, without folders that are nobody's business.
        overwrite: replace a README that prolora did not write, or that was edited since.

    Raises:
        ForeignFile: such a README is there.
        OutputError: the card cannot be written.
    """
    written = [o for o in outcomes if not o.planned and not o.error]
    if any(outcome.report for outcome in written):
        check_beside(card, "card", overwrite=overwrite)
        write_text_atomically(card, render_card([_CardEntry.of(o) for o in written], command))


def render_card(moved: Sequence[_CardEntry], command: str) -> str:
    """The text of a card: what the Hub reads, then a section for each LoRA."""
    title = moved[0].outcome.out.stem if len(moved) == 1 else f"{len(moved)} moved LoRAs"
    move = moved[0].move
    blocks = [
        _write_front(moved),
        f"{MARK} {__version__} {make_mark('card')} -->",
        f"# {escape_markdown(title)}",
        f"{'A LoRA' if len(moved) == 1 else 'LoRAs'} for **{escape_markdown(move.target)}**, moved "
        f"from {escape_markdown(move.source)} by prolora, without training and without data.",
    ]
    for one in moved:
        if len(moved) > 1:
            blocks.append(f"## {escape_markdown(one.outcome.out.name)}")
        blocks += _describe_lora(one)
    return "\n\n".join([*blocks, "## How it was made", _write_command(command)]) + "\n"


def _write_front(moved: Sequence[_CardEntry]) -> str:
    """The YAML that the Hub reads; every text is a JSON string, which YAML takes."""
    names = [one.move.target for one in moved] + [one.move.source for one in moved]
    bases = ["/".join(name.split("/")[:2]) for name in names]  # of "org/name/file", the repository
    words = {one.header.get("modelspec.trigger_phrase") for one in moved}
    licences = {one.header.get("modelspec.license") for one in moved}
    tags = ["lora", "prolora", *_list_tags(moved)]
    lines = ["---", "base_model:", *(f"- {quote(name)}" for name in dict.fromkeys(bases))]
    lines.append("base_model_relation: adapter")
    library = _find_library(moved)
    if library:
        lines.append(f"library_name: {library}")
    lines += ["tags:", *(f"- {quote(tag)}" for tag in dict.fromkeys(tags))]
    word = words.pop() if len(words) == 1 else None
    if word:
        lines.append(f"instance_prompt: {quote(word)}")
    licence = licences.pop() if len(licences) == 1 else None
    if licence and _LICENSE_ID.fullmatch(licence):
        lines.append(f"license: {quote(licence)}")
    elif licence:
        lines += ["license: other", f"license_name: {quote(licence)}"]
    return "\n".join([*lines, "---"])


def _list_tags(moved: Sequence[_CardEntry]) -> list[str]:
    """The family's id, and the tags that the LoRAs' own headers have."""
    tags = []
    for one in moved:
        tags += [one.file.family] if one.file.family else []
        listed = one.header.get("modelspec.tags", "").split(",")
        tags += [tag.strip() for tag in listed if tag.strip()]
    return tags


def _find_library(moved: Sequence[_CardEntry]) -> str | None:
    """The library that loads all of them: PEFT's folders, or files that diffusers reads.

    Which programs read a LoRA is not known for models of no known family; the Hub lists those under
    diffusers like all others.
    """
    if all(one.outcome.out.is_dir() for one in moved):
        return "peft"
    read = all("diffusers" in (one.file.readers or ("diffusers",)) for one in moved)
    return "diffusers" if read else None


def _describe_lora(one: _CardEntry) -> list[str]:
    """What a LoRA keeps, how it is used, and what it was made of."""
    report, header, move = one.report, one.header, one.move
    sentences = _tell(report) if report else ["Moved in an earlier run."]
    blocks, used = ["\n".join(f"- {escape_markdown(sentence)}" for sentence in sentences)], []
    if one.file.trigger_words:
        words = ", ".join(escape_markdown(word) for word in one.file.trigger_words)
        used.append(f"- Trigger words: {words} (carried over from the header of the LoRA)")
    licence = header.get("modelspec.license")
    if licence:
        used.append(
            f"- Licence: {escape_markdown(licence)} (carried over from the header of the LoRA)"
        )
    else:
        used.append("- Licence: the LoRA's header names none; those of both bases apply")
    if one.file.readers:
        used.append(f"- Read by: {', '.join(one.file.readers)}")
    blocks += ["To use it:", "\n".join(used), "In numbers:"]
    lora_hash = header.get("prolora.lora_hash", "")
    rows = [
        *_list_numbers(report),
        ("method", f"{move.method}, strength {header.get('prolora.strength', '1')}"),
        ("ranks", _show_ranks(one.file)),
        ("file", f"{one.outcome.out.name}, sha256:{one.digest}"),
        ("LoRA", f"{one.outcome.lora.name}, {lora_hash}"),
        ("target", f"{move.target}, {move.target_hash}"),
        ("source", f"{move.source}, {move.source_hash}"),
    ]
    table = [f"| {name} | {escape_markdown(text)} |" for name, text in rows]
    blocks.append("\n".join(["| | |", "|---|---|", *table]))
    return blocks


def _tell(report: Report) -> list[str]:
    """The verdict in words; what to do next is for whoever moved the LoRA."""
    words = report.in_words()
    lines = [line for line in words.lines if not line.startswith("Next:")]
    return [f"{words.mark} {words.headline}", *lines, *words.cautions]


def _list_numbers(report: Report | None) -> list[tuple[str, str]]:
    """The numbers of a report, by what each is called."""
    if report is None:
        return []
    totals = report.totals
    known = [(name, totals[key], form) for name, key, form in _NUMBERS if _is_known(totals[key])]
    shown = [(name, format(value, form)) for name, value, form in known]
    return [("modules moved", f"{report.coverage:.0%}"), *shown]


_NUMBERS = (
    ("modules skipped", "skipped", "d"),
    ("energy of the moved modules", "energy_mapped", ".0%"),
    ("energy kept of that", "energy_surviving", ".0%"),
    ("distance to plain copying", "copy_distance", ".2f"),
    ("overlap Φ, left", "phi_left", ".2f"),
    ("overlap Φ, right", "phi_right", ".2f"),
)


def _is_known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _show_ranks(file: Description) -> str:
    low, high = file.rank_min, file.rank_max
    return str(low) if low == high else f"{low} to {high}"


def _write_command(command: str) -> str:
    """The command in a fence that it cannot close."""
    text = replace_controls(command)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    return f"{fence}bash\n{text}\n{fence}"


def quote(text: str) -> str:
    """A text as a JSON string, which is one in YAML too."""
    return json.dumps(replace_controls(text), ensure_ascii=False)


def escape_markdown(text: str) -> str:
    """A text as Markdown that says just that, in a line."""
    line = " ".join(replace_controls(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", line)
