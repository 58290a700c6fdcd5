"""A folder of a program's source, and a checkpoint to hold LoRAs against."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import torch
from torch import Tensor

from prolora.architectures.family import Family
from prolora.architectures.layouts import load_layout
from prolora.architectures.shared_names import unet_names

Keys = dict[str, list[str]]
Read = Callable[[dict[str, Tensor], Keys], set[str]]
"""(tensors of a file, canonical module -> its keys) -> the keys that a program takes."""
Open = Callable[[Family, str], Read | None]
"""A program's reader for one published size; None where it has no such model."""


class _EmptyPackages(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that a program imports and this does not need, where they are not installed."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = {name for name in names if importlib.util.find_spec(name) is None}

    def find_spec(
        self, fullname: str, path: object, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = MagicMock(name=spec.name)
        module.__spec__, module.__path__, module.__name__ = spec, [], spec.name
        module.__version__ = "0"
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def enter(checkout: Path, *missing: str) -> None:
    """Makes a checkout importable."""
    sys.path.insert(0, str(checkout))
    sys.meta_path.append(_EmptyPackages(missing))


def with_alphas(taken: set[str], tensors: Iterable[str]) -> set[str]:
    """The keys taken, and the alphas beside them."""
    return taken | {
        key
        for key in tensors
        if key.endswith(".alpha") and f"{key.removesuffix('alpha')}lora_up.weight" in taken
    }


def mark_pairs(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[float, str]]:
    """Gives each pair of factors a value of its own, by which it is found again, cut or fused.

    Returns the tensors, and value -> what the keys of the pair begin with.
    """
    paths = sorted({key.rpartition(".lora_")[0] for key in tensors if ".lora_" in key})
    values = {path: float(number + 2) for number, path in enumerate(paths)}
    marked = {
        key: tensor.clone().fill_(values[key.rpartition(".lora_")[0]])
        if ".lora_" in key
        else tensor
        for key, tensor in tensors.items()
    }
    return marked, {value: path for path, value in values.items()}


def number_rows(rows: int) -> Tensor:
    """The first factor of a LoRA of rank 1, by which a reader's rows can be told apart."""
    return torch.arange(1.0, rows + 1)[:, None]


def keeps_rows(up: Tensor) -> bool:
    """Whether a factor that `number_rows` made still has its rows in order, at any scale."""
    sums = up.double().flatten(1).sum(1)
    wanted = number_rows(len(up)).double().flatten()
    return torch.allclose(sums / sums.sum(), wanted / wanted.sum(), rtol=1e-3)


def take_modules(read: Iterable[str], keys: Keys) -> set[str]:
    """The keys that hold nothing but modules that were read."""
    read = set(read)
    lost = {key for name, of in keys.items() if name not in read for key in of}
    return {key for of in keys.values() for key in of} - lost


def name_weights(family: Family, layout: str) -> dict[str, tuple[int, ...]]:
    """The weights of a checkpoint as the authors name them -> their shapes."""
    parts: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in load_layout(layout).shapes.items():
        layers = 1 if family.id in ("koala", "bk-sdm") else 2
        names = unet_names(layers) if family.unet else family
        weight = names.find_weight_holding(name)
        stored = weight.name if weight else name
        parts.setdefault(stored, []).append(shape)
    bare = ("table", "token", "tokens", ".pos_embed", ".modulation", "_ca_video", "_ca_audio")
    return {
        name if name.endswith(bare) else f"{name}.weight": (sum(s[0] for s in of), *of[0][1:])
        for name, of in parts.items()
    }


def store_hollow(family: Family, layout: str) -> dict[str, Tensor]:
    """A checkpoint in the authors' names on the meta device: matrices and biases."""
    state = {}
    for name, shape in name_weights(family, layout).items():
        state[name] = torch.empty(shape, device="meta")
        if name.endswith(".weight"):
            state[f"{name.removesuffix('weight')}bias"] = torch.empty(shape[0], device="meta")
    return state


def fit_factors(networks: Iterable[object], tensors: dict[str, Tensor]) -> set[str]:
    """The keys that kohya's modules of a network take: by name and shape."""
    taken = set()
    for network in networks:
        name = network.lora_name  # type: ignore[attr-defined]
        ends = ("lora_up.weight", "lora_down.weight")
        fits = all(
            f"{name}.{end}" in tensors
            and tensors[f"{name}.{end}"].numel()
            == network.get_submodule(end.removesuffix(".weight")).weight.numel()  # type: ignore[attr-defined]
            for end in ends
        )
        if fits:
            taken |= {f"{name}.{end}" for end in (*ends, "alpha")} & tensors.keys()
    return taken
