"""Maps from one look at both models: ``python bench/quality/maps.py --work DIR --out FILE``.

Images of both origins (the target's own, and the source's with the LoRA) are re-noised, and both
models run forwards and backwards from one random cotangent. A module reads x and has slopes g at
its output; with C = Σ x_s x_t', G = Σ g_s g_t' the LoRA B·A moves to f(G)'·B · A·f(C):

    ridge     f(C) = C (Σ x_t x_t' + λ)⁻¹
    polar     the orthogonal factor of C (rectangular where widths differ)
    whitened  S^½ polar(S^-½ C T^-½) T^-½ with S = Σ x_s x_s' + λ, T = Σ x_t x_t' + λ

λ is a share of the mean diagonal. Rows have the share of the held-out loss that a LoRA trained on
the target recovers, and `promise` = 1 − what is missed of the source's change on other samples:
what a gate could know. Rows that FILE has are not made again.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from contenders import Updates, scale_updates
from results import RowsFile
from scoring import SAMPLE_STEPS, apply_updates
from torch import Tensor, nn
from worlds import World, backbone
from yards import Yard, choose_world, open_yard

# isort: split
from model import noised, predict

from prolora import LowRank

SAMPLES, ROUNDS, UNSEEN = 96, 4, 48
"""Images of each origin, noises of each, and images of each that judge."""
Rows = dict[str, Tensor]
Moments = dict[str, list[Tensor]]
"""Module -> x_s x_t', x_t x_t', x_s x_s', and the same of the slopes."""


def draw_questions(yard: Yard, seed: int, count: int, rounds: int) -> Iterator[tuple]:
    """Yields noised images, times and prompts, of both origins in turn."""
    world = yard.world
    y = world.draw_prompts(count, torch.Generator().manual_seed(seed), yard.adapter == "concept")
    own = world.sample(yard.target, y, SAMPLE_STEPS, world.guidance, seed)
    with apply_updates(yard.source, yard.lora):
        adapted = world.sample(yard.source, y, SAMPLE_STEPS, world.guidance, seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        for x in (own, adapted):
            xt, t, _ = noised(x, generator)
            yield xt, t, y, torch.randn(x.shape, generator=generator)


def observe(world: World, model: nn.Module, names: list[str], question: tuple) -> tuple[Rows, Rows]:
    """What the modules read, and the slopes at their outputs, as rows."""
    xt, t, y, cotangent = question
    reads, slopes = Rows(), Rows()
    with ExitStack() as hooks:
        for name in names:
            module = backbone(model).get_submodule(name)

            def read(_: Any, given: tuple[Tensor], __: Any, name: str = name) -> None:
                reads[name] = given[0].detach().flatten(0, -2)

            def slope(_: Any, __: Any, above: tuple[Tensor], name: str = name) -> None:
                slopes[name] = above[0].detach().flatten(0, -2)

            hooks.callback(module.register_forward_hook(read).remove)
            hooks.callback(module.register_full_backward_hook(slope).remove)
        tokens = world.tokens(model, y).clone().requires_grad_(True)
        (predict(model, xt.clone().requires_grad_(True), t, tokens) * cotangent).sum().backward()
    return reads, slopes


def gather(yard: Yard, names: list[str], seed: int) -> Moments:
    """Sums moments over questions."""
    moments: Moments = {}
    for question in draw_questions(yard, seed, SAMPLES, ROUNDS):
        sides = (observe(yard.world, side, names, question) for side in (yard.source, yard.target))
        for name, (s, t) in ((n, p) for n, p in pair_rows(names, *sides) if p):
            new = [s.mT @ t, t.mT @ t, s.mT @ s]
            moments[name] = (
                [a + b for a, b in zip(moments[name], new, strict=True)] if name in moments else new
            )
    return moments


def pair_rows(names: list[str], source: tuple[Rows, Rows], target: tuple[Rows, Rows]) -> Iterator:
    """Yields ("module" or "module'", rows of both), where both have them."""
    for mark, ours, theirs in (("", source[0], target[0]), ("'", source[1], target[1])):
        for name in names:
            if name in ours and name in theirs:
                yield name + mark, (ours[name], theirs[name])


def damp(square: Tensor, share: float) -> Tensor:
    return square.double() + share * square.diagonal().mean().double() * torch.eye(len(square))


def polar(cross: Tensor, *_: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(cross.double(), full_matrices=False)
    return u @ v


def ridge(cross: Tensor, target: Tensor, _: Tensor, share: float = 0.1) -> Tensor:
    return torch.linalg.solve(damp(target, share), cross.double().mT).mT


def whitened(cross: Tensor, target: Tensor, source: Tensor, share: float = 1.0) -> Tensor:
    def root(square: Tensor, power: float) -> Tensor:
        w, v = torch.linalg.eigh(damp(square, share))
        return (v * w**power) @ v.mT

    middle = polar(root(source, -0.5) @ cross.double() @ root(target, -0.5))
    return root(source, 0.5) @ middle @ root(target, -0.5)


MAPS: dict[str, Callable[..., Tensor]] = {"polar": polar, "ridge": ridge, "whitened": whitened}


def move(lora: Updates, moments: Moments, way: Callable[..., Tensor]) -> Updates:
    """Moves by maps of what is read and of the slopes; a module without one keeps that side."""
    moved = {}
    for name, update in lora.items():
        up, down = update.up.double(), update.down.double()
        if name in moments:
            down = down @ way(*moments[name])
        if name + "'" in moments:
            up = way(*moments[name + "'"]).mT @ up
        moved[name] = LowRank(up.float(), down.float())
    return moved


@torch.no_grad()
def promise(yard: Yard, updates: Updates, seed: int) -> float:
    """1 − Σ‖change − wanted‖²/Σ‖wanted‖², wanted being the source's change on unseen samples."""
    missed = total = 0.0
    for xt, t, y, _ in draw_questions(yard, seed, UNSEEN, 2):
        changes = []
        for side, its in ((yard.source, yard.lora), (yard.target, updates)):
            tokens = yard.world.tokens(side, y)
            plain = predict(side, xt, t, tokens)
            with apply_updates(side, its):
                changes.append(predict(side, xt, t, tokens) - plain)
        missed += float((changes[1] - changes[0]).square().sum())
        total += float(changes[0].square().sum())
    return round(1 - missed / total, 4)


def make_row(yard: Yard, seed: int, fits: bool) -> dict[str, Any]:
    """Shares and promises of the copy, of every map and, where asked for, of the fit."""
    before = time.process_time()
    known = dict(backbone(yard.target).named_modules())
    names = [name for name in yard.lora if name in known]
    moments = gather(yard, names, 100 + seed)
    seconds = round(time.process_time() - before, 1)
    same = {name: yard.lora[name] for name in names}
    ways = {"copy": same, "copy 0.6": scale_updates(same, 0.6)}
    ways |= {name: move(same, moments, way) for name, way in MAPS.items()}
    if fits:
        ways["fit"] = yard.fit(yard.lora, seed=6 * seed).scaled
    row = {
        name: {"share": yard.share(updates), "promise": promise(yard, updates, 200 + seed)}
        for name, updates in ways.items()
    }
    return row | {"cpu of the maps": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", default="apart")
    parser.add_argument("--adapters", nargs="+", default=["neon", "duotone", "concept"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--fits", action="store_true", help="the fit as well")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = RowsFile(given.out)
    for seed, adapter in itertools.product(given.seeds, given.adapters):
        key = f"icons, {given.kind}, {adapter}, seed {seed}"
        if key not in table.rows:
            yard = open_yard(choose_world("shipped"), given.work / "shipped", given.kind, adapter)
            table.add(key, make_row(yard, seed, given.fits))


if __name__ == "__main__":
    main()
