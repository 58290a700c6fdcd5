"""The four nodes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import host, jobs
from .declaration import Field, Node

_LORA = Field("lora", "combo", "The LoRA to move.", options=host.list_loras)
_SOURCE = Field("source", "combo", "The base that it was trained on.", options=host.list_bases)
_TARGET = Field("target", "combo", "The base model that it moves to.", options=host.list_bases)
_METHOD = Field(
    "method",
    "combo",
    "auto decides from the weights of both bases; copy changes nothing; prolora is the published "
    "projection.",
    jobs.AUTO,
    lambda: jobs.METHODS,
)
_STRENGTH = Field(
    "strength",
    "float",
    "The factor on every update that is written into the file. 0 lets prolora decide.",
    0.0,
    limits=(0.0, 4.0),
)
_FORMAT = Field(
    "format",
    "combo",
    "How the file spells its modules: as ComfyUI reads them, or another way.",
    jobs.FORMATS[0],
    lambda: jobs.FORMATS,
)
_RANK = Field(
    "rank",
    "string",
    'The rank of the result: "exact", "same", a number, a percentage of the energy such as "99%", '
    'or the size of a file such as "100MB".',
    "exact",
)


def _read_options(method: str, strength: float, format: str, rank: str) -> dict[str, Any]:
    """Options of `transfer_many` from what the widgets hold."""
    return {
        "method": method,
        "strength": strength or None,
        "format": format,
        "out_rank": int(rank) if rank.strip().isdecimal() else rank.strip(),
    }


def move_lora(
    lora: str, source: str, target: str, method: str, strength: float, format: str, rank: str
) -> tuple[str, str]:
    """Moves one LoRA: its name for ComfyUI's loader, and the report."""
    path, report = jobs.move_one(
        {lora: host.find_lora(lora)},
        host.find_base(source),
        host.find_base(target),
        host.find_place(target),
        host.make_progress(),
        **_read_options(method, strength, format, rank),
    )
    return host.name_lora(path), report


def load_moved_lora(
    model: Any,
    clip: Any,
    lora: str,
    source: str,
    target: str,
    method: str,
    strength_model: float,
    strength_clip: float,
) -> tuple[Any, Any, str]:
    """Moves a LoRA unless it was moved before, and applies it."""
    path, report = jobs.move_one(
        {lora: host.find_lora(lora)},
        host.find_base(source),
        host.find_base(target),
        host.find_place(target),
        host.make_progress(),
        method=method,
        format="comfyui",
    )
    return (*host.apply_lora(model, clip, path, strength_model, strength_clip), report)


def move_folder(
    folder: str, source: str, target: str, method: str, strength: float, format: str, rank: str
) -> tuple[str]:
    """Moves every LoRA of a folder."""
    inside = [
        name
        for name in host.list_loras()
        if folder in (host.ALL_LORAS, os.path.dirname(name)) and Path(name).parts[0] != jobs.MOVED
    ]
    outcomes = jobs.move_loras(
        {name: host.find_lora(name) for name in inside},
        host.find_base(source),
        host.find_base(target),
        host.find_place(target),
        host.make_progress(),
        **_read_options(method, strength, format, rank),
    )
    return (jobs.summarise(inside, outcomes),)


def advise(source: str, target: str, lora: str) -> tuple[str]:
    """What to expect of a LoRA of one base on the other."""
    path = None if lora == jobs.NO_LORA else host.find_lora(lora)
    bases = host.find_base(source), host.find_base(target)
    return (jobs.advise(*bases, path, host.make_progress()),)


def fingerprint(**values: Any) -> str:
    """Size and time of the files that are named, so that a changed file is moved again."""
    paths = []
    if values.get("lora", jobs.NO_LORA) != jobs.NO_LORA:
        paths.append(host.find_lora(values["lora"]))
    paths += [host.find_base(values[name]) for name in ("source", "target") if values.get(name)]
    return " ".join(f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in paths)


def fingerprint_folder(folder: str, **values: Any) -> str:
    """`fingerprint`, and the names of the LoRAs of a folder."""
    return f"{fingerprint(**values)} {host.list_loras()}"


NODES = (
    Node(
        "ProloraMoveLora",
        "Move LoRA to another base",
        "Writes the LoRA that belongs on another base below loras/zz-moved, without training. "
        "Both bases are read from the disk, a layer at a time; none is loaded.",
        (_LORA, _SOURCE, _TARGET, _METHOD, _STRENGTH, _FORMAT, _RANK),
        (("STRING", "lora_name"), ("STRING", "report")),
        move_lora,
        fingerprint,
    ),
    Node(
        "ProloraAdvise",
        "Advise on moving LoRAs",
        "Says from the weights of two base models whether LoRAs of one can move to the other, and "
        "how; with a LoRA, where its modules would go. Writes nothing.",
        (
            _SOURCE,
            _TARGET,
            Field(
                "lora",
                "combo",
                "A LoRA, or none.",
                jobs.NO_LORA,
                lambda: [jobs.NO_LORA, *host.list_loras()],
            ),
        ),
        (("STRING", "report"),),
        advise,
        fingerprint,
    ),
    Node(
        "ProloraLoadMovedLora",
        "Load moved LoRA",
        "Moves the LoRA once, keeps the file below loras/zz-moved, and applies it to the model and "
        "its text encoder.",
        (
            Field("model", "MODEL", "The target base model, loaded."),
            Field("clip", "CLIP", "Its text encoder."),
            _LORA,
            _SOURCE,
            _TARGET,
            _METHOD,
            Field("strength_model", "float", "As of Load LoRA.", 1.0, limits=(-10.0, 10.0)),
            Field("strength_clip", "float", "As of Load LoRA.", 1.0, limits=(-10.0, 10.0)),
        ),
        (("MODEL", "model"), ("CLIP", "clip"), ("STRING", "report")),
        load_moved_lora,
        fingerprint,
    ),
    Node(
        "ProloraMoveFolder",
        "Move folder of LoRAs",
        "Moves every LoRA of a folder below loras. One that cannot be moved stops no other, and "
        "those that were moved before are left alone.",
        (
            Field("folder", "combo", "The folder.", host.ALL_LORAS, host.list_lora_folders),
            _SOURCE,
            _TARGET,
            _METHOD,
            _STRENGTH,
            _FORMAT,
            _RANK,
        ),
        (("STRING", "report"),),
        move_folder,
        fingerprint_folder,
    ),
)
