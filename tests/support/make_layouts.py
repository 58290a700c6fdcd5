"""Writes the tables of layouts from diffusers' classes: names and shapes, no weights.

    python tests/support/make_layouts.py [ID …]

A table is the names and shapes of all parameters of two or more axes, made on the meta device from
the configuration that a model was published with. `PUBLISHED`, `VIDEOS` and `OTHERS` have the
configurations where they differ from the defaults of the class, and where each is known from;
`ELSEWHERE` has what builds those that diffusers has no class of.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import diffusers
import torch
from published_elsewhere import ELSEWHERE
from published_models import PUBLISHED, Published
from published_others import OTHERS
from published_videos import VIDEOS

TABLES = Path(__file__).parents[2] / "python/prolora/architectures/tables"


def build_model(model: Published, **changes: object) -> torch.nn.Module:
    """The model of a class of diffusers, without memory for its weights."""
    with torch.device("meta"):
        if model.build is not None:
            return model.build()
        built = getattr(diffusers, model.cls).from_config({**model.config, **changes})
        for part, cls in model.attached.items():
            built.add_module(part, getattr(diffusers, cls)())
    return built


def list_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Module (or bare parameter) -> shape, for all parameters of two or more axes."""
    return {
        name.removesuffix(".weight"): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
    }


def join_ranges(names: list[str]) -> list[str]:
    """Names that differ in a number alone, 0 to 18, become one: `blocks.{0-18}.attn.to_q`."""
    for place in range(max(name.count(".") for name in names) + 1):
        runs: dict[tuple[str, ...], list[list[int]]] = {}
        for name in names:
            words = name.split(".")
            if place < len(words) and words[place].isdecimal():
                number, words[place] = int(words[place]), ""
                lists = runs.setdefault(tuple(words), [])
                if not lists or lists[-1][-1] + 1 != number:
                    lists.append([])
                lists[-1].append(number)
        joined = {}
        for words, lists in runs.items():
            for run in lists:
                text = f"{{{run[0]}-{run[-1]}}}" if len(run) > 1 else str(run[0])
                whole = ".".join((*words[:place], text, *words[place + 1 :]))
                for number in run:
                    joined[".".join((*words[:place], str(number), *words[place + 1 :]))] = whole
        names = list(dict.fromkeys(joined.get(name, name) for name in names))
    return names


def format_table(id_: str, model: Published) -> str:
    """A table as it is stored: a line for each shape."""
    by_shape: dict[str, list[str]] = {}
    for name, shape in list_shapes(build_model(model)).items():
        by_shape.setdefault("x".join(map(str, shape)), []).append(name)
    head = {"id": id_, "title": model.title, "text_encoders": model.text_encoders}
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).removesuffix("}")
    if not model.cls.startswith("UNet"):  # whose blocks differ from one another
        by_shape = {shape: join_ranges(names) for shape, names in by_shape.items()}
    lines = [
        f' "{shape}":{json.dumps(names, separators=(",", ":"))}'
        for shape, names in by_shape.items()
    ]
    return f'{text},"shapes":{{\n' + ",\n".join(lines) + "\n}}\n"


if __name__ == "__main__":
    models = {**PUBLISHED, **VIDEOS, **OTHERS, **ELSEWHERE}
    for id_ in sys.argv[1:] or models:
        (TABLES / f"{id_}.json").write_text(format_table(id_, models[id_]), "utf-8")
