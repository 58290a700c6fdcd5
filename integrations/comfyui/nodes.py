"""The nodes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import host, jobs, words

log = logging.getLogger("prolora")

CHOOSE = "choose…"
FROM_LORA = "from the LoRA"
ALL_LORAS = "(all)"
ANY_MODEL = "any model"

NO_LORA = "none"
COLUMNS = (0.0, 0.5, 0.8, 1.0)
"""The strengths that *Draw before and after* draws; the verdicts advise the two in the middle."""

_SLOTS = range(1, 5)
"""Of *Merge LoRAs*."""
_JOB = ("lora", "folder", "trained_on", "use_on", "method", "rank", "format", "style", "prompts")
_JOB += tuple(f"{name}_{i}" for i in _SLOTS for name in ("lora", "strength"))
"""The inputs that say what is written."""
_HIDDEN = {"graph": "PROMPT", "node": "UNIQUE_ID"}
_STRENGTH = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01}


class LoraName(str):
    """The type of an output that fits core's *Load LoRA*.

    The type of that input is the list of names at the moment, to which no fixed type is equal.
    ComfyUI asks for inequality, and lets types answer themselves.
    """

    def __ne__(self, other: object) -> bool:
        """Whether ComfyUI shall refuse the connection."""
        return not isinstance(other, list) and str.__ne__(self, other)


def _combo(
    choices: Sequence[str], tooltip: str, label: str | None = None, folded: bool = False
) -> tuple[list[str], dict[str, Any]]:
    """An input to choose from; the first choice is the usual one.

    Without a label people read its name; `web/report.js` shows what is folded on request.
    """
    known = {"tooltip": tooltip, "default": choices[0], "folded": folded}
    return list(choices), known | ({"display_name": label} if label else {})


def _list_inputs() -> dict[str, Any]:
    """The inputs that the nodes share, by name; folders are read anew each time."""
    bases = list(host.map_bases())
    return {
        "lora": _combo([CHOOSE, *host.list_loras()], "The LoRA to move.", "LoRA"),
        "trained_on": _combo(
            [FROM_LORA, *bases],
            "The model that the LoRA was trained on. Many LoRAs tell which one it was.",
            "trained on",
        ),
        "use_on": _combo([CHOOSE, *bases], "The model that you want to use it on.", "use on"),
        "method": _combo(
            jobs.METHODS,
            "auto copies the LoRA, and refuses where the files of both models have nothing in "
            "common. best also runs both models where their files tell too little, for minutes to "
            "hours; both must be whole pipelines, which are folders in models/diffusers. copy "
            "never refuses; prolora is for experiments.",
            folded=True,
        ),
        "rank": _combo(
            list(words.RANKS),
            "The size of the result. exact loses nothing; same and half go by the LoRA's own rank; "
            "a number keeps at most that rank.",
            folded=True,
        ),
        "format": _combo(
            list(jobs.FORMATS),
            "How the file names its parts: for ComfyUI, as it came in, or for other programs.",
            "file for",
            folded=True,
        ),
        "style": _combo(
            list(words.STYLES),
            "Of the method best: whether pictures keep the style of the new model, or look as on "
            "the model that the LoRA was trained on.",
            folded=True,
        ),
        "prompts": (
            "STRING",
            {
                "multiline": True,
                "default": "",
                "folded": True,
                "tooltip": "Of the method best: what to draw while both models are asked, one a "
                "line, with the trigger words. Without any they are made from the LoRA.",
            },
        ),
    }


def _take(*names: str, **more: Any) -> dict[str, dict[str, Any]]:
    """INPUT_TYPES of a node: some of the shared inputs, and its own before them."""
    shared = _list_inputs()
    return {"required": {**more, **{name: shared[name] for name in names}}}


def _show(report: str, page: Path | None, *values: Any) -> dict[str, Any]:
    """What a node returns: the report as its last output, and on the node with a link."""
    shown = {"text": (report,), "page": (host.name_lora(page),) if page else ()}
    return {"ui": shown, "result": (*values, report)}


def _find_lora(name: str) -> Path:
    """A LoRA that was chosen."""
    if name == CHOOSE:
        raise words.Refusal("Choose the LoRA, under “LoRA”.")
    return host.find_lora(name)


def _find_target(name: str) -> Path:
    """A target that was chosen."""
    if name == CHOOSE:
        raise words.Refusal("Choose the model that you want to use the LoRA on, under “use on”.")
    return host.find_base(name)


def _find_source(name: str, lora: str, use_on: str) -> str:
    """The name of the base that a LoRA was trained on, chosen or told by the LoRA."""
    told = jobs.find_trained_on(host.find_lora(lora), host.map_bases())
    if told is not None and told == use_on and name not in (FROM_LORA, use_on):
        raise words.Refusal(
            f"This LoRA says that it was trained on {words.shorten(use_on)}: choose the models the "
            "other way round. Nothing was written."
        )
    if name != FROM_LORA:
        return name
    if told is None:
        raise words.Refusal(
            "This LoRA does not tell which model it was trained on, or that model is not in your "
            "folders. Choose it under “trained on”."
        )
    return told


def _name_job(values: Mapping[str, Any]) -> str:
    """What a node is asked to write, by its inputs."""
    return str([values.get(name) for name in _JOB])


def _move(
    loras: Mapping[str, Path], source: str, use_on: str, settings: Mapping[str, str], linked: bool
) -> list[jobs.Moved]:
    """Moves LoRAs of one base; `linked` as in `jobs.move_loras`."""
    if settings["method"] == jobs.BEST:
        host.free_memory()
    return jobs.move_loras(
        loras,
        host.find_base(source),
        _find_target(use_on),
        host.find_place(use_on),
        jobs.Settings(**settings),
        host.make_progress(),
        linked,
    )


def _move_one(
    next_step: str, lora: str, trained_on: str, use_on: str, **settings: str
) -> tuple[jobs.Moved, str, str]:
    """One LoRA: the result, its name in ComfyUI's list, and the report with the next step."""
    files = {lora: _find_lora(lora)}
    _find_target(use_on)
    source = _find_source(trained_on, lora, use_on)
    (moved,) = _move(files, source, use_on, settings, linked=False)
    if moved.error is not None:
        raise words.Refusal(moved.error)
    told = " (as the LoRA tells)" if trained_on == FROM_LORA else ""
    way = f"from {words.shorten(source)}{told} to {words.shorten(use_on)}"
    name = lora if moved.path == files[lora] else host.name_lora(moved.path)
    done, next_step = ("Not written again", "") if name == lora else ("Moved", next_step)
    asked = {"lora": lora, "trained_on": trained_on, "use_on": use_on, **settings}
    host.remember_results(_name_job(asked), [moved.path])
    return moved, name, words.tell_report(moved.told, name, f"{done} {way}", next_step)


def _warn(graph: dict[str, Any], node: str, use_on: str) -> str:
    """A line where a model is loaded that is not the one under *use on*; else nothing."""
    loaded = host.find_loaded(graph, node)
    used = host.map_bases()
    if loaded is None or use_on not in used or used.get(loaded, used[use_on]) == used[use_on]:
        return ""
    return (
        f"⚠ {words.shorten(loaded)} is loaded, and “use on” is {words.shorten(use_on)}: choose the "
        "same model in both.\n"
    )


class _ProloraNode:
    """What the nodes have in common."""

    CATEGORY = "loaders/prolora"
    FUNCTION = "run"
    OUTPUT_NODE = True
    RETURN_TYPES: tuple[str, ...] = ("STRING",)
    RETURN_NAMES: tuple[str, ...] = ("report",)
    OUTPUT_TOOLTIPS: tuple[str, ...] = ("What to know, in a few lines.",)
    INPUTS: tuple[str, ...] = ()  # of the shared ones
    work: Callable[..., dict[str, Any]]  # what the node returns; raises a Refusal

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI asks for, each time that it lists the nodes."""
        return _take(*cls.INPUTS)

    def run(self, **values: Any) -> dict[str, Any]:
        """What the node returns; a refusal is a report with ✖, and outputs that are not there."""
        try:
            return self.work(**values)
        except words.Refusal as error:
            host.remember_results(_name_job(values), None)
            # Whoever asks by the API sees no node.
            log.warning(
                "%s: %s", NODE_DISPLAY_NAME_MAPPINGS[f"Prolora{type(self).__name__}"], error
            )
            return _show(f"✖ {error}", None, *[host.ABSENT for _ in self.RETURN_TYPES[1:]])

    @classmethod
    def IS_CHANGED(cls, **values: Any) -> str:
        """Differs where a file that is used changed, a result was deleted, or it was refused."""
        names = [str(value) for value in values.values()]
        if values.get("trained_on") == FROM_LORA:
            names += host.map_bases()
        return f"{host.count_losses(_name_job(values))} {host.read_states(names)}"


class MoveLora(_ProloraNode):
    """Moves one LoRA."""

    DESCRIPTION = (
        "Writes the LoRA that belongs on another model, without training. Both models are read "
        "from the disk, a layer at a time; neither is loaded."
    )
    RETURN_TYPES = (LoraName("COMBO"), "STRING")
    RETURN_NAMES = ("LoRA", "report")
    OUTPUT_TOOLTIPS = ("Connect it to lora_name of Load LoRA.", "What to expect, in six lines.")
    INPUTS = ("lora", "trained_on", "use_on", "method", "rank", "format", "style", "prompts")

    def work(self, **asked: str) -> dict[str, Any]:
        """The name of the result in ComfyUI's list, and the report."""
        step = "Load it: connect the output “LoRA” to Load LoRA, or press R to refresh the lists."
        moved, name, report = _move_one(step, **asked)
        return _show(report, moved.page, name)


class LoadMovedLora(_ProloraNode):
    """Moves one LoRA unless it was moved before, and applies it."""

    DESCRIPTION = (
        "Moves the LoRA once, keeps the file, and applies it to the model and its text encoder in "
        "place of Load LoRA."
    )
    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES = ("model", "clip", "report")
    OUTPUT_TOOLTIPS = (
        "The model with the LoRA.",
        "The text encoder with the LoRA.",
        "What to expect, in six lines.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI asks for, each time that it lists the nodes."""
        inputs = _take(
            *("lora", "trained_on", "use_on"),
            model=("MODEL", {"tooltip": "The model under “use on”, loaded."}),
        )
        clip = ("CLIP", {"tooltip": "The text encoder of the model, for LoRAs that change it too."})
        inputs |= {"optional": {"clip": clip}, "hidden": _HIDDEN}
        for name, of in (("strength_model", "model"), ("strength_clip", "text encoder")):
            tooltip = f"How strongly the LoRA changes the {of}, as in Load LoRA."
            inputs["required"][name] = ("FLOAT", _STRENGTH | {"tooltip": tooltip})
        inputs["required"]["method"] = _list_inputs()["method"]
        return inputs

    def work(
        self,
        model: Any,
        strength_model: float,
        strength_clip: float,
        clip: Any = None,
        graph: dict[str, Any] | None = None,
        node: str = "",
        **asked: str,
    ) -> dict[str, Any]:
        """The model and the text encoder with the LoRA, and the report."""
        step = "It is applied to the outputs of this node. To load it elsewhere, press R."
        moved, _, report = _move_one(step, **asked)
        report = _warn(graph or {}, node, asked["use_on"]) + report
        patched = host.apply_lora(model, clip, moved.path, strength_model, strength_clip)
        return _show(report, moved.page, *patched)


class BeforeAndAfter(_ProloraNode):
    """Moves one LoRA unless it was moved before, and draws with and without it."""

    DESCRIPTION = (
        "Draws one picture with the loaded model, from one seed: without the LoRA, with the moved "
        "one at the strengths 0.5, 0.8 and 1, and with your own file where that differs."
    )
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("side by side", "report")
    OUTPUT_TOOLTIPS = (
        "The pictures in a row, each with its label.",
        "What to expect, in six lines.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI asks for, each time that it lists the nodes."""
        # Links, not what they link to: core's nodes take them from there.
        link = {"rawLink": True, "lazy": True}
        text = {"multiline": True, "dynamicPrompts": True}
        inputs = _take(
            *("lora", "trained_on", "use_on"),
            model=("MODEL", {"tooltip": "The model under “use on”, loaded."} | link),
            clip=("CLIP", {"tooltip": "The text encoder of the loaded model."} | link),
            vae=("VAE", {"tooltip": "The VAE of the loaded model."} | link),
            latent_image=("LATENT", {"tooltip": "An empty latent image: the size to draw."} | link),
        )
        inputs["required"] |= {
            "prompt": ("STRING", text | {"tooltip": "What to draw, with the trigger words."}),
            "avoid": ("STRING", text | {"tooltip": "What not to draw: the negative prompt."}),
            **host.list_sampling_inputs(),
            "method": _list_inputs()["method"],
        }
        return inputs | {"hidden": _HIDDEN}

    def work(
        self, graph: dict[str, Any] | None = None, node: str = "", **drawn: Any
    ) -> dict[str, Any]:
        """The pictures in a row, and the report."""
        asked = {name: drawn.pop(name) for name in ("lora", "trained_on", "use_on", "method")}
        moved, name, report = _move_one("The pictures have one seed.", **asked)
        report = _warn(graph or {}, node, asked["use_on"]) + report
        columns = [(f"{x:g}" if x else "without", name, x) for x in COLUMNS]
        if not jobs.holds_the_same(_find_lora(asked["lora"]), moved.path):
            columns.append(("your file, 1", asked["lora"], 1.0))
        drawing, pictures = host.draw_side_by_side(columns, drawn)
        return _show(report, moved.page, pictures) | {"expand": drawing}


class SideBySide:
    """Puts pictures in a row, each below its label."""

    DESCRIPTION = "Puts pictures in a row, each below its label."
    CATEGORY = "loaders/prolora"
    FUNCTION = "run"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("side by side",)
    OUTPUT_TOOLTIPS = ("The pictures in a row.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI asks for: five pictures at most."""
        lines = {"multiline": True, "tooltip": "A line for each picture, from the left."}
        picture = ("IMAGE", {"tooltip": "A picture; all have one size."})
        more = {f"picture_{i}": picture for i in range(2, 6)}
        required = {"picture_1": picture, "labels": ("STRING", lines)}
        return {"required": required, "optional": more}

    def run(self, labels: str, **pictures: Any) -> tuple[Any]:
        """The row."""
        return (host.join_row([pictures[name] for name in sorted(pictures)], labels.split("\n")),)


class MoveFolder(_ProloraNode):
    """Moves every LoRA of a folder."""

    DESCRIPTION = (
        "Moves every LoRA of a folder. One that cannot be moved stops no other, and those that "
        "were moved before are left alone."
    )
    OUTPUT_TOOLTIPS = ("A line for each LoRA.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI asks for, each time that it lists the nodes."""
        folders = [CHOOSE, ALL_LORAS, *host.list_lora_folders()]
        return _take(
            *("trained_on", "use_on", "method", "rank", "format", "style", "prompts"),
            folder=_combo(
                folders,
                "A folder of your LoRAs, without the folders inside it. (all) takes every LoRA.",
            ),
        )

    @classmethod
    def IS_CHANGED(cls, **values: Any) -> str:
        """The same, and that of all LoRAs."""
        return f"{super().IS_CHANGED(**values)} {host.read_states(host.list_trained_loras())}"

    def work(self, folder: str, trained_on: str, use_on: str, **settings: str) -> dict[str, Any]:
        """A line for each LoRA."""
        if folder == CHOOSE:
            raise words.Refusal("Choose the folder of LoRAs that you want to move, under “folder”.")
        _find_target(use_on)
        inside = [
            name
            for name in host.list_trained_loras()
            if folder in (ALL_LORAS, os.path.dirname(name))
        ]
        lines: dict[str, str] = {}
        by_source: dict[str, dict[str, Path]] = {}
        for name in inside:
            try:
                source = _find_source(trained_on, name, use_on)
            except words.Refusal as error:
                lines[name] = f"✖ {name}: {error}"
            else:
                by_source.setdefault(source, {})[name] = host.find_lora(name)
        done: list[Path] = []
        for source, loras in by_source.items():
            results = _move(loras, source, use_on, settings, linked=True)
            for name, moved in zip(loras, results, strict=True):
                if moved.error is not None:
                    lines[name] = f"✖ {name}: {moved.error.removeprefix(f'{name}: ')}"
                    continue
                lines[name] = words.tell_in_one_line(name, moved.told)
                done.append(moved.path)
        asked = {"folder": folder, "trained_on": trained_on, "use_on": use_on, **settings}
        host.remember_results(_name_job(asked), done)
        rows = {name: lines[name] for name in inside}
        return _show(words.tell_folder(rows, f"loras/{jobs.MOVED}"), None)


class MergeLoras(_ProloraNode):
    """Makes one LoRA of several."""

    DESCRIPTION = "Writes one LoRA that does what several do together, each at its strength."
    RETURN_TYPES = (LoraName("COMBO"), "STRING")
    RETURN_NAMES = ("LoRA", "report")
    OUTPUT_TOOLTIPS = ("Connect it to lora_name of Load LoRA.", "What is in it, and what is lost.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI asks for: four LoRAs at most."""
        inputs: dict[str, Any] = {}
        for i in _SLOTS:
            first = CHOOSE if i < 3 else NO_LORA
            known = [first, *host.list_loras()]
            inputs[f"lora_{i}"] = _combo(known, "A LoRA of the model.", f"LoRA {i}")
            strength = _STRENGTH | {
                "tooltip": "How strongly it acts in the result, as in Load LoRA."
            }
            inputs[f"strength_{i}"] = ("FLOAT", strength)
        tooltip = (
            "How they become one: sum does what loading all of them does, balanced does once what "
            "several do alike."
        )
        inputs["method"] = _combo(["sum", "balanced"], tooltip, folded=True)
        return {"required": inputs}

    def work(self, method: str, **values: Any) -> dict[str, Any]:
        """The name of the result in ComfyUI's list, and the report."""
        chosen = [i for i in _SLOTS if values[f"lora_{i}"] != NO_LORA]
        loras = {values[f"lora_{i}"]: _find_lora(values[f"lora_{i}"]) for i in chosen}
        if len(loras) < len(chosen):
            raise words.Refusal("Choose each LoRA once; its strength says how much it counts.")
        strengths = [values[f"strength_{i}"] for i in chosen]
        merged = jobs.merge(loras, strengths, method, host.find_output_root())
        name = host.name_lora(merged.path)
        step = "Load it: connect the output “LoRA” to Load LoRA."
        report = words.tell_report(merged.told, name, f"Merged {len(loras)} LoRAs", step)
        host.remember_results(_name_job(values | {"method": method}), [merged.path])
        return _show(report, merged.page, name)


class Advise(_ProloraNode):
    """Says what to expect of a LoRA of one base on another."""

    DESCRIPTION = (
        "Looks into the files of two models and says whether LoRAs of one work on the other. "
        "Writes nothing."
    )
    INPUTS = ("lora", "trained_on", "use_on")

    def work(self, lora: str, trained_on: str, use_on: str) -> dict[str, Any]:
        """What to expect."""
        target = _find_target(use_on)
        path = _find_lora(lora)
        source = host.find_base(_find_source(trained_on, lora, use_on))
        return _show(jobs.advise(source, target, path, host.make_progress()), None)


class CheckLora(_ProloraNode):
    """Says what a LoRA is, and whether it acts."""

    DESCRIPTION = (
        "Reads the LoRA: what it is for, how much of it ComfyUI applies, and what is wrong with it."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI asks for, each time that it lists the nodes."""
        tooltip = "Is the LoRA for this model? Its file is read; it is not loaded."
        model = _combo([ANY_MODEL, *host.map_bases()], tooltip)
        lora = _combo([CHOOSE, *host.list_loras()], "The LoRA to look at.", "LoRA")
        return {"required": {"lora": lora, "model": model}}

    def work(self, lora: str, model: str) -> dict[str, Any]:
        """What `prolora check` says."""
        base = None if model == ANY_MODEL else host.find_base(model)
        return _show(jobs.check(_find_lora(lora), base), None)


_NODES = {
    "ProloraMoveLora": (MoveLora, "Move LoRA to another model"),
    "ProloraLoadMovedLora": (LoadMovedLora, "Load moved LoRA"),
    "ProloraBeforeAndAfter": (BeforeAndAfter, "Draw before and after"),
    "ProloraMoveFolder": (MoveFolder, "Move folder of LoRAs"),
    "ProloraMergeLoras": (MergeLoras, "Merge LoRAs"),
    "ProloraSideBySide": (SideBySide, "Pictures side by side"),
    "ProloraAdvise": (Advise, "Can this LoRA move?"),
    "ProloraCheckLora": (CheckLora, "What is this LoRA?"),
}
NODE_CLASS_MAPPINGS = {name: node for name, (node, _) in _NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: title for name, (_, title) in _NODES.items()}
