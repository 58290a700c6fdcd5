"""LyCORIS with algo=locon: of lycoris/kohya.py in sd-scripts and musubi-tuner, and of wrapper.py.

sd-scripts and musubi-tuner have it as a `--network_module`; folders of these names with their
source are expected next to the checkout. The models are those of `trainer_files.sd_scripts` and
`musubi_tuner` (which needs easydict). The preset is the default, "full". It names the classes of
blocks to train, convolutions included, and lacks many: of Anima, Z-Image and HiDream-O1 only the
last layer has a class of a listed name, and T5 and Qwen3 have none.

The wrapper takes any model and trains all of its linear and convolutional layers, so that some
models of diffusers stand for the others. LoHa, LoKr, DoRA and the rest are not here: a `Cell`
cannot represent them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from loader_programs.common import enter
from torch import nn

from prolora.architectures.families import known_families

from . import Cell, Shape, musubi_tuner, sd_scripts
from .musubi_tuner import LORA, find_modules

sys.path.append(str(Path(__file__).parents[2] / "tests/support"))

from make_layouts import build_model
from published_models import PUBLISHED
from published_unets import UNETS
from published_videos import VIDEOS

WRAPPED = ("sd15", "sdxl", "flux1-dev", "sd3.5-medium", "qwen-image", "z-image", "wan-t2v-14b")
"""Layouts of models of diffusers, on which the wrapper is tried."""


def list_cells(checkout: Path) -> Iterator[Cell]:
    scripts, musubi = checkout.parent / "sd-scripts", checkout.parent / "musubi-tuner"
    empty = "cv2 imagesize toml voluptuous torchvision sentencepiece av ftfy".split()
    for folder in (musubi / "src", scripts, checkout):
        enter(folder, *empty)
    for model in sd_scripts.MODELS:
        cell = make_sd_scripts(model, scripts, trained=False)
        yield cell
        if model.encoders:
            trained = make_sd_scripts(model, scripts, trained=True)
            if trained.modules != cell.modules:
                yield trained
    with patch("torch.cuda.current_device", return_value=0):  # the default of an argument
        find_musubi("wan.modules.t5")
    yield from map(make_musubi, musubi_tuner.MODELS)
    yield from map(wrap, WRAPPED)


def find_musubi(name: str) -> Any:
    return importlib.import_module(f"musubi_tuner.{name}")


def make_cell(network: nn.Module, model: str, note: str, **fields: Any) -> Cell:
    """Reads the network's state; it has none if the preset lacks the model."""
    state = network.state_dict()
    modules: Mapping[str, Shape] = find_modules(state, LORA) if state else {}
    how = "network class" if state else "not obtainable"
    note += "" if state else ": its preset has none of the classes, so that nothing is trained"
    return Cell(model=model, how=how, note=note, modules=modules, **fields)


def make_sd_scripts(model: sd_scripts.Model, scripts: Path, trained: bool) -> Cell:
    """Makes the network as train_network.py does, with the text encoders trained or not."""
    with torch.device("meta"):
        base = model.build(lambda name: importlib.import_module(f"library.{name}"))
        encoders = [sd_scripts.build_text_encoder(name, scripts) for name in model.encoders]
        # Stable Diffusion 1 and 2 have one encoder and no list.
        texts = encoders[0] if model.networks == "lora" and len(encoders) == 1 else encoders
        network = create_kohya(texts, base)
        network.apply_to(texts, base, trained, True)
    names = [type(base).__name__, *model.encoders * trained]
    return make_cell(
        network,
        f"sd-scripts: {model.name}" + " with text encoders" * trained,
        f"lycoris.kohya on {', '.join(names)}",
        family=model.family,
        layout=model.layout,
        metadata=sd_scripts.describe(model) | {"ss_network_module": "lycoris.kohya"},
    )


def make_musubi(
    model: tuple[str, str, str, str, str, Callable[[musubi_tuner.Module], nn.Module]],
) -> Cell:
    """Makes the network as training/trainer_base.py does; there are no text encoders."""
    name, family, layout, architecture, networks, build = model
    with torch.device("meta"):
        base = build(find_musubi)
        network = create_kohya(None, base)
        network.apply_to(None, base, apply_text_encoder=False, apply_unet=True)
    metadata = musubi_tuner.describe(find_musubi, architecture, networks)
    return make_cell(
        network,
        f"musubi-tuner: {name}",
        f"lycoris.kohya on {type(base).__name__}",
        family=family,
        layout=layout,
        metadata=metadata | {"ss_network_module": "lycoris.kohya"},
    )


def create_kohya(encoders: Any, base: nn.Module) -> Any:
    create = importlib.import_module("lycoris.kohya").create_network
    return create(1.0, 4, 4.0, None, encoders, base, algo="locon")


def wrap(layout: str) -> Cell:
    """Makes the network as LyCORIS's README says."""
    published = {**PUBLISHED, **VIDEOS, **UNETS}[layout]
    base = build_model(published)
    with torch.device("meta"):
        create = importlib.import_module("lycoris.wrapper").create_lycoris
        network = create(base, 1.0, linear_dim=4, linear_alpha=4.0, algo="locon")
        network.apply_to()
    families = known_families().items()
    return make_cell(
        network,
        f"wrapper: {published.title}",
        f"create_lycoris of lycoris.wrapper on {type(base).__name__} of diffusers",
        family=next(id_ for id_, family in families if layout in family.layouts),
        layout=layout,
    )
