"""What the nodes say: the verdict first, in a few plain lines, in the words of the widgets."""

from __future__ import annotations

import re
from pathlib import Path

import prolora
from prolora.errors import name_options

AIMS = {"target's look": "target", "LoRA's own look": "lora"}
RANKS = {"exact": "exact", "same": "100%", "half": "50%"} | {
    str(rank): rank for rank in (4, 8, 16, 32, 64, 128)
}

GENERIC_NAMES = ("diffusion_pytorch_model", "model", "unet", "transformer")
"""What files and folders of any model are called."""

# What prolora's messages call by options, and the nodes by their widgets.
_WIDGETS = {
    "source": "“trained on”",
    "target": "“use on”",
    "look=lora": "the aim “LoRA's own look”",
    "look=target": "the aim “target's look”",
    "method": "“method”",
    "out_rank": "“rank”",
    "format": "“file for”",
}
_FOR_OTHERS = re.compile(r"`[a-z_]+(?:=[^`]*|\(\))?`|(?<![\w-])--[a-z]|\bpython -[cm]\b")
_ALL = 0.995
_AMOUNTS = ((_ALL, "All"), (0.7, "Most"), (0.4, "About half"), (0.1, "A small part"))
_LITTLE = 0.4
"""Of a LoRA of which less than this has a place, little is to be expected."""


def shorten(model: str) -> str:
    """A model's name in ComfyUI's list, without what tells nothing."""
    parts = Path(model).with_suffix("").parts
    return "/".join([part for part in parts if part not in GENERIC_NAMES] or parts)


def explain(error: prolora.ProLoRAError) -> str:
    """Why a LoRA cannot be moved, without advice that only a command line can follow."""
    if isinstance(error, prolora.UnrelatedBases):
        return (
            "The models under “trained on” and “use on” have nothing in common: they were trained "
            "apart, and no LoRA of one works on the other. Nothing was written."
        )
    clauses = re.split(r"(?<=[.;:])\s+", name_options(str(error), _name_widget))
    kept = " ".join(clause for clause in clauses if not _FOR_OTHERS.search(clause)).rstrip(";: ")
    return kept or "This LoRA cannot be moved between these two models."


def _name_widget(option: str, value: str | None) -> str | None:
    """A widget, and what to choose there; None for what the nodes do not have."""
    widget = _WIDGETS.get(option if value is None else f"{option}={value}")
    if widget is None and value not in (None, "()") and option in _WIDGETS:
        return f"{_WIDGETS[option]}: {value}"
    return widget


def judge(verdict: prolora.Verdict | None, placed: float | None) -> tuple[str, str]:
    """A mark, and what to expect.

    Args:
        verdict: on the two bases; None where nobody looked at their weights.
        placed: the share of the LoRA that has a place on the target; None without a LoRA.
    """
    if verdict is not None and not verdict.related:
        return "✖", "Do not expect this to work: the two models have nothing in common."
    if verdict is not None and not verdict.go:
        return "⚠", "Do not expect much: the model that you use has learnt something else."
    if placed is not None and placed < _LITTLE:
        return "⚠", "Do not expect much: most of this LoRA belongs to parts that the model lacks."
    if verdict is None:
        return "✔", "Done as you asked; the two models were not compared."
    if verdict.drift == 0:
        return "✔", "Both models are the same where it counts: the LoRA works as it is."
    return "✔", "This should work: the two models are closely related."


def judge_report(report: prolora.Report) -> tuple[str, str]:
    """`judge` a LoRA that was moved."""
    return judge(report.verdict, report.totals["energy_mapped"])


def tell_report(report: prolora.Report | None, name: str, way: str, next_step: str) -> str:
    """At most six lines on a LoRA that was moved.

    Args:
        report: None if it was moved before.
        name: of the result in ComfyUI's list.
        way: from which model to which.
        next_step: what the user does now.
    """
    if report is None:
        lines = [f"✔ Already moved {way} with the same settings."]
    else:
        lines = [" ".join(judge_report(report)), _tell_share(report), _tell_method(report, way)]
    return "\n".join(
        [
            *lines,
            f"File: loras/{name}",
            next_step,
            "The button opens the whole report.",
        ]
    )


def tell_in_one_line(name: str, report: prolora.Report | None, error: str | None) -> str:
    """What became of a LoRA among many.

    Args:
        name: of the LoRA in ComfyUI's list.
        report: None if it was not moved now.
        error: why it cannot be moved.
    """
    if error is not None:
        return f"✖ {name}: {error}"
    if report is None:
        return f"✔ {name}: moved before"
    share = report.totals["energy_mapped"] or 0.0
    return f"{judge_report(report)[0]} {name}: moved, {share:.0%} of it found a place"


def _tell_share(report: prolora.Report) -> str:
    """How much of a LoRA arrived."""
    placed = report.totals["energy_mapped"] or 0.0
    kept = report.totals["energy_surviving"] or 0.0
    amount = next((word for least, word in _AMOUNTS if placed >= least), "Very little")
    rest = "all" if kept >= _ALL else f"{kept:.0%}"
    return f"{amount} of the LoRA ({placed:.0%}) found a place, and {rest} of that was kept."


def _tell_method(report: prolora.Report, way: str) -> str:
    """What was done, and why."""
    if report.method == "copy":
        return f"What was done: copied {way}, unchanged."
    if report.method == "damped":
        return (
            f"What was done: moved {way}, and weakened where the two models differ, so that images "
            "keep the look of the model that you use."
        )
    return f"What was done: moved {way} by the method “{report.method}”."


def tell_advice(advice: prolora.Advice) -> str:
    """At most six lines on a LoRA, or on LoRAs of one base, before anything is moved."""
    fit, decision = advice.lora, advice.decision
    lines = [" ".join(judge(advice.verdict, fit.kept_energy if fit else None))]
    if fit is not None:
        lines.append(
            f"{fit.paired} of the LoRA's {fit.modules} parts have a place on that model; they hold "
            f"{fit.kept_energy:.0%} of it."
        )
    expected = [x for x in advice.expected if decision and x.method == decision.method]
    lines += [
        f"Expect about {x.share:.0%} of what a LoRA trained on that model gives ({x.low:.0%} to "
        f"{x.high:.0%}, measured on small models)."
        for x in expected
        if x.want == "look"
    ]
    if decision is not None:
        copies = decision.method == "copy"
        done = "copy the LoRA unchanged" if copies else "weaken it where the two models differ"
        lines.append(f"Move LoRA would {done}.")
    return "\n".join(lines)
