"""What the nodes say: the verdict first, in a few plain lines, in the words of the widgets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import prolora
from prolora.errors import name_options


class Refusal(ValueError):
    """Why a node does not do what it is asked for, in a sentence."""


STYLES = {"of the new model": "target", "as the LoRA was made": "source"}
RANKS = {"exact": "exact", "same": "100%", "half": "50%"} | {
    str(rank): rank for rank in (4, 8, 16, 32, 64, 128)
}

GENERIC_NAMES = ("diffusion_pytorch_model", "model", "unet", "transformer")
"""What files and folders of any model are called."""

# What prolora's messages call by options, and the nodes by their widgets.
_WIDGETS = {
    "source": "“trained on”",
    "target": "“use on”",
    "method": "“method”",
    "method=best": "the method “best”",
    "out_rank": "“rank”",
    "format": "“file for”",
    "look": "“style”",
    "look=source": "“style”: as the LoRA was made",
}
_INSTALL = re.compile(r"pip install (?:-U )?([\w ]*\w)")
_BY_FIT = (
    "Nothing was written. If you have both as whole pipelines, choose those and the method “best”."
)
_FOR_OTHERS = re.compile(r"`[a-z_]+(?:=[^`]*|\(\))?`|(?<![\w-])--[a-z]|\bpython -[cm]\b")


def shorten(model: str) -> str:
    """A model's name in ComfyUI's list, without what tells nothing."""
    parts = Path(strip_ending(model)).parts
    return "/".join([part for part in parts if part not in GENERIC_NAMES] or parts)


def strip_ending(model: str) -> str:
    """A model's name without the ending of a file; that of a folder may hold a dot."""
    return re.sub(r"\.(safetensors|sft|ckpt|pt|pth|bin|gguf)$", "", model, flags=re.IGNORECASE)


def explain(
    error: prolora.ProLoRAError, in_fit: bool = False, names: Mapping[Path, str] | None = None
) -> str:
    """Why a LoRA cannot be moved, without advice that only a command line can follow.

    `in_fit` says that both models ran; `names` are those of ComfyUI's lists, in place of paths.
    """
    apart = isinstance(error, prolora.errors.UnrelatedBases)
    if apart and in_fit:
        return (
            "Running both models did not help: they behave too differently for this LoRA, as new "
            "images show. Nothing was written."
        )
    if apart:
        return (
            "The models under “trained on” and “use on” have nothing in common: they were trained "
            f"apart, and no LoRA of one works on the other. {_BY_FIT}"
        )
    if isinstance(error, prolora.errors.ShapeMismatch) and "fits the target" in str(error):
        return (
            "The models under “trained on” and “use on” are built differently: no part of this "
            f"LoRA has a place on the second. {_BY_FIT}"
        )
    if wrong := re.search(r"This LoRA is for .*source you gave, .*?(?=\.? \(|\. I)", str(error)):
        told = re.sub("The source you gave, (.*), is ", r"“trained on” is \1: ", wrong[0])
        return f"{told}. Choose the model that the LoRA was trained on."
    text = str(error).removesuffix(error.command).rstrip()
    for path, name in (names or {}).items():
        text = text.replace(str(path), name)
    # What a node cannot do may have been taken from the end, and its full stop.
    return (say(text) or "This LoRA cannot be moved between these two models").rstrip(".") + "."


def say(text: str) -> str:
    """A message of prolora's in the words of the widgets, without what a node cannot do."""
    text = _INSTALL.sub(r"install \1 for the Python that runs ComfyUI", text)
    clauses = re.split(r"(?<=[.;:])\s+", name_options(text, _name_widget))
    return " ".join(c for c in clauses if not _FOR_OTHERS.search(c)).rstrip(";: ")


def _name_widget(option: str, value: str | None) -> str | None:
    """A widget, and what to choose there; None for what the nodes do not have."""
    widget = _WIDGETS.get(option if value is None else f"{option}={value}")
    if widget is None and value not in (None, "()") and option in _WIDGETS:
        return f"{_WIDGETS[option]}: {value}"
    return widget


def preview(name: str) -> str:
    """What prolora says of a fit before it begins, in few words; "" of any other stage."""
    work = re.search(r"as long as drawing ([\d,]+) images takes", name)
    return f"Both models run, about as long as drawing {work[1]} images takes." if work else ""


def tell_progress(share: float, name: str, foreseen: str = "") -> str:
    """How far a job is, and how long it takes: as its name tells, else as was foreseen."""
    left = re.search(r", ([^,]+) left$", name)
    told = f"Working: {share:.0%} done" + (f", about {left[1]} left." if left else ".")
    return told if left or not foreseen else f"{told}\n{foreseen}"


def tell_report(told: Any, name: str, way: str, next_step: str) -> str:
    """At most six lines on a LoRA that was moved; `name` is its own in ComfyUI's list."""
    kept = [line for line in (*told.lines, *told.cautions) if not line.startswith("Next:")]
    moved = " ".join([f"{way}.", *kept[:1]])
    lines = [f"{told.mark} {told.headline}", f"File: {Path('loras', name)}", moved, *kept[1:]]
    lines += [f"{next_step} The button opens the whole report."] if next_step else []
    return "\n".join(map(say, lines))


def tell_in_one_line(name: str, told: Any) -> str:
    """A row on a LoRA among many: the mark, its name, the strengths and the verdict."""
    advice = f"load it at strength {told.strengths}: " if told.strengths else ""
    return f"{told.mark} {name}: {advice}{say(told.headline)}"


def tell_folder(rows: Mapping[str, str], where: str) -> str:
    """The report of a folder: the worst mark with the count of each, and a row for each LoRA."""
    marks = [row[0] for row in rows.values()]
    counts = ", ".join(f"{marks.count(mark)} {mark}" for mark in "✔⚠✖" if mark in marks)
    worst = max(marks, key="✔⚠✖".index, default="✖")
    number = f"{len(rows)} LoRA{'' if len(rows) == 1 else 's'} ({counts or 'none'})"
    return "\n".join([f"{worst} {number}, in place below {where}.", *rows.values()])
