"""A model card for the Hugging Face Hub, from selected header entries."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..adapters.adapter_folder import PEFT_WEIGHTS
from ..adapters.formats.moves import Move, read_moves
from ..adapters.lora import Lora
from ..core.controls import replace_controls
from ..errors import UnsupportedFormat
from ..files.hashing import hash_file
from ..files.store import check_free, put_text
from ..version import __version__
from .outcome import Outcome

CARD = "README.md"
_WORDS, _LICENCE, _TAGS = (f"modelspec.{key}" for key in ("trigger_phrase", "license", "tags"))
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # as the Hub lists them: "apache-2.0"


def check_card(out: Path, in_folder: bool, overwrite: bool) -> Path:
    """Returns where the card of a run stands; refuses a README that exists.

    Raises:
        OutputExists: a README exists.
        UnsupportedFormat: `huggingface_hub` is not installed.
    """
    _import_hub()
    card = (out if in_folder else out.parent) / CARD
    check_free(card, overwrite=overwrite)
    return card


def write_card(card: Path, outcomes: Iterable[Outcome], overwrite: bool = False) -> None:
    """Writes the card of all results; nothing where none is new.

    Raises:
        OutputExists: a README is there.
        OutputError: the card cannot be written.
    """
    written = [one for one in outcomes if not one.planned and not one.error]
    if not all(one.kept for one in written):
        put_text(card, _render_card(written), overwrite=overwrite)


def _render_card(written: Sequence[Outcome]) -> str:
    headers = [dict(Lora.open(one.out).metadata) for one in written]
    moves = [(read_moves(header) or (Move(),))[-1] for header in headers]
    title = written[0].out.stem if len(written) == 1 else f"{len(written)} moved LoRAs"
    blocks = [
        f"<!-- written by prolora {__version__} -->",
        f"# {_escape(title)}",
        f"For **{_escape(moves[0].target)}**, moved from {_escape(moves[0].source)} by prolora, "
        "without training and without data.",
    ]
    for one, header, move in zip(written, headers, moves, strict=True):
        blocks += [f"## {_escape(one.out.name)}", *_describe_lora(one, header, move)]
    data = _describe_data(written, headers, moves)
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(blocks) + "\n"


def _describe_data(
    written: Sequence[Outcome], headers: Sequence[dict[str, str]], moves: Sequence[Move]
) -> Any:
    """Returns the metadata for the Hub: these header keys and no other."""
    licences, words = ({header.get(key, "") for header in headers} for key in (_LICENCE, _WORDS))
    licence, word = ("" if len(x) > 1 else max(x) for x in (licences, words))
    entries: dict[str, Any] = {"license": licence} if _LICENCE_ID.fullmatch(licence) else {}
    if licence and not entries:
        entries = {"license": "other", "license_name": replace_controls(licence)}
    if word:
        entries["instance_prompt"] = replace_controls(word)
    tags = [tag.strip() for header in headers for tag in header.get(_TAGS, "").split(",")]
    names = [move.target for move in moves] + [move.source for move in moves]
    bases = ["/".join(name.split("/")[:2]) for name in names if name]
    return _import_hub().ModelCardData(
        base_model=list(dict.fromkeys(map(replace_controls, bases))),
        base_model_relation="adapter",
        library_name="peft" if all(one.out.is_dir() for one in written) else "diffusers",
        tags=list(dict.fromkeys(["lora", "prolora", *map(replace_controls, filter(None, tags))])),
        **entries,
    )


def _describe_lora(one: Outcome, header: dict[str, str], move: Move) -> list[str]:
    sentences = ["Moved in an earlier run."]
    if one.report and not one.kept:
        words = one.report.in_words()
        lines = [line for line in words.lines if not line.startswith("Next:")]
        sentences = [f"{words.mark} {words.headline}", *lines, *words.cautions]
    licence = header.get(_LICENCE) or "the LoRA's header names none; those of both bases apply"
    sentences += [f"Trigger words: {header[_WORDS]}"] if header.get(_WORDS) else []
    sentences += [f"Licence: {licence}", f"Method: {move.method}"]
    weights = one.out / PEFT_WEIGHTS if one.out.is_dir() else one.out
    lines = [f"- {_escape(line)}" for line in sentences]
    return ["\n".join([*lines, f"- SHA-256 of the file: {hash_file(weights)}"])]


def _import_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UnsupportedFormat(
            "a model card needs the client of the hub: pip install huggingface_hub"
        ) from error
    return huggingface_hub


def _escape(text: str) -> str:
    """Escapes a text as one line of literal Markdown."""
    line = " ".join(replace_controls(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", line)
