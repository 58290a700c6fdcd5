"""The nodes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import host, jobs, words

CHOOSE = "choose…"
FROM_LORA = "from the LoRA"
ALL_LORAS = "(all)"
ANY_MODEL = "any model"

_JOB = ("lora", "folder", "trained_on", "use_on", "method", "rank", "format")
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
        raise ValueError("Choose the LoRA, under “LoRA”.")
    return host.find_lora(name)


def _find_target(name: str) -> Path:
    """A target that was chosen."""
    if name == CHOOSE:
        raise ValueError("Choose the model that you want to use the LoRA on, under “use on”.")
    return host.find_base(name)


def _find_source(name: str, lora: str) -> str:
    """The name of the base that a LoRA was trained on, chosen or told by the LoRA."""
    if name != FROM_LORA:
        return name
    told = jobs.find_trained_on(host.find_lora(lora), host.map_bases())
    if told is None:
        raise ValueError(
            "This LoRA does not tell which model it was trained on, or that model is not in your "
            "folders. Choose it under “trained on”."
        )
    return told


def _name_job(values: Mapping[str, Any]) -> str:
    """What a node is asked to write, by its inputs."""
    return str([values.get(name) for name in _JOB])


def _move(
    loras: Mapping[str, Path], source: str, use_on: str, settings: Mapping[str, str]
) -> list[jobs.Moved]:
    """Moves LoRAs of one base."""
    if settings["method"] == jobs.BEST:
        host.free_memory()
    return jobs.move_loras(
        loras,
        host.find_base(source),
        _find_target(use_on),
        host.find_place(use_on),
        jobs.Settings(**settings),
        host.make_progress(),
    )


def _move_one(
    lora: str, trained_on: str, use_on: str, settings: Mapping[str, str], next_step: str
) -> tuple[jobs.Moved, str, str]:
    """One LoRA: the result, its name in ComfyUI's list and the report, which tells the next step.

    Raises:
        ValueError: a sentence says why not.
    """
    files = {lora: _find_lora(lora)}
    _find_target(use_on)
    source = _find_source(trained_on, lora)
    (moved,) = _move(files, source, use_on, settings)
    if moved.error is not None:
        raise ValueError(moved.error)
    asked = {"lora": lora, "trained_on": trained_on, "use_on": use_on, **settings}
    host.remember_results(_name_job(asked), [moved.path])
    told = " (as the LoRA tells)" if trained_on == FROM_LORA else ""
    way = f"from {words.shorten(source)}{told} to {words.shorten(use_on)}"
    name = host.name_lora(moved.path)
    return moved, name, words.tell_report(moved.told, name, way, next_step)


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

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI asks for, each time that it lists the nodes."""
        return _take(*cls.INPUTS)

    @classmethod
    def IS_CHANGED(cls, **values: Any) -> str:
        """Differs where a file that is used changed, and where a result was deleted."""
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
    INPUTS = ("lora", "trained_on", "use_on", "method", "rank", "format")

    def run(self, lora: str, trained_on: str, use_on: str, **settings: str) -> dict[str, Any]:
        """The name of the result in ComfyUI's list, and the report."""
        step = "Load it: connect the output “LoRA” to Load LoRA, or press R to refresh the lists."
        moved, name, report = _move_one(lora, trained_on, use_on, settings, step)
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

    def run(
        self,
        model: Any,
        lora: str,
        trained_on: str,
        use_on: str,
        strength_model: float,
        strength_clip: float,
        clip: Any = None,
        graph: dict[str, Any] | None = None,
        node: str = "",
        **settings: str,
    ) -> dict[str, Any]:
        """The model and the text encoder with the LoRA, and the report."""
        step = "It is applied to the outputs of this node. To load it elsewhere, press R."
        moved, _, report = _move_one(lora, trained_on, use_on, settings, step)
        report = _warn(graph or {}, node, use_on) + report
        patched = host.apply_lora(model, clip, moved.path, strength_model, strength_clip)
        return _show(report, moved.page, *patched)


class BeforeAndAfter(_ProloraNode):
    """Moves one LoRA unless it was moved before, and draws with and without it."""

    DESCRIPTION = (
        "Draws one picture three times with the model that is loaded, from the same seed: without "
        "the LoRA, with the LoRA copied as it is, and with the LoRA moved."
    )
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("side by side", "report")
    OUTPUT_TOOLTIPS = (
        "From the left: without the LoRA, with the LoRA copied, with the LoRA moved.",
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
            "strength": ("FLOAT", _STRENGTH | {"tooltip": "How strongly the LoRA acts."}),
            **host.list_sampling_inputs(),
            "method": _list_inputs()["method"],
        }
        return inputs | {"hidden": _HIDDEN}

    def run(
        self,
        lora: str,
        trained_on: str,
        use_on: str,
        method: str,
        strength: float,
        graph: dict[str, Any] | None = None,
        node: str = "",
        **drawn: Any,
    ) -> dict[str, Any]:
        """The three pictures in a row, and the report."""
        step = "The pictures: without the LoRA, copied, moved; the same seed."
        settings = {"method": method}
        moved, name, report = _move_one(lora, trained_on, use_on, settings, step)
        report = _warn(graph or {}, node, use_on) + report
        drawing, pictures = host.draw_side_by_side((None, lora, name), strength, drawn)
        return _show(report, moved.page, pictures) | {"expand": drawing}


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
            *("trained_on", "use_on", "method", "rank", "format"),
            folder=_combo(
                folders,
                "A folder of your LoRAs, without the folders inside it. (all) takes every LoRA.",
            ),
        )

    @classmethod
    def IS_CHANGED(cls, **values: Any) -> str:
        """The same, and that of all LoRAs."""
        return f"{super().IS_CHANGED(**values)} {host.read_states(host.list_trained_loras())}"

    def run(self, folder: str, trained_on: str, use_on: str, **settings: str) -> dict[str, Any]:
        """A line for each LoRA."""
        if folder == CHOOSE:
            raise ValueError("Choose the folder of LoRAs that you want to move, under “folder”.")
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
                source = _find_source(trained_on, name)
            except ValueError as error:
                lines[name] = words.tell_in_one_line(name, None, None, str(error))
            else:
                by_source.setdefault(source, {})[name] = host.find_lora(name)
        done: list[Path] = []
        for source, loras in by_source.items():
            results = _move(loras, source, use_on, settings)
            for name, moved in zip(loras, results, strict=True):
                lines[name] = words.tell_in_one_line(name, moved.told, moved.share, moved.error)
                done += [moved.path] if moved.error is None else []
        asked = {"folder": folder, "trained_on": trained_on, "use_on": use_on, **settings}
        host.remember_results(_name_job(asked), done)
        mark = "✔" if len(done) == len(inside) else "⚠" if done else "✖"
        lines[""] = f"{mark} In place below loras/{jobs.MOVED}: {len(done)} of {len(inside)} LoRAs."
        return _show("\n".join(lines[name] for name in ["", *inside]), None)


class Advise(_ProloraNode):
    """Says what to expect of a LoRA of one base on another."""

    DESCRIPTION = (
        "Looks into the files of two models and says whether LoRAs of one work on the other. "
        "Writes nothing."
    )
    INPUTS = ("lora", "trained_on", "use_on")

    def run(self, lora: str, trained_on: str, use_on: str) -> dict[str, Any]:
        """What to expect."""
        target = _find_target(use_on)
        path = _find_lora(lora)
        source = host.find_base(_find_source(trained_on, lora))
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

    def run(self, lora: str, model: str) -> dict[str, Any]:
        """What `prolora check` says."""
        base = None if model == ANY_MODEL else host.find_base(model)
        return _show(jobs.check(_find_lora(lora), base), None)


_NODES = {
    "ProloraMoveLora": (MoveLora, "Move LoRA to another model"),
    "ProloraLoadMovedLora": (LoadMovedLora, "Load moved LoRA"),
    "ProloraBeforeAndAfter": (BeforeAndAfter, "Draw before and after"),
    "ProloraMoveFolder": (MoveFolder, "Move folder of LoRAs"),
    "ProloraAdvise": (Advise, "Can this LoRA move?"),
    "ProloraCheckLora": (CheckLora, "What is this LoRA?"),
}
NODE_CLASS_MAPPINGS = {name: node for name, (node, _) in _NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: title for name, (_, title) in _NODES.items()}
