"""Scores every way of moving one terrain LoRA: the held-out loss, and samples of some."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from contenders import (
    STRENGTHS,
    Case,
    Updates,
    arbitrate,
    copy_updates,
    extract_difference,
    judge_bases,
    make_projection,
    run_transfer,
    scale_updates,
)
from network import Network
from torch import Tensor
from world import (
    CHANGES,
    STEEP,
    Batch,
    Maps,
    ask_base,
    distance,
    measure_terrains,
    sample_terrains,
)

METHODS: dict[str, Callable[[Case], Updates]] = {
    "auto": functools.partial(run_transfer, method="auto"),
    "prolora 0.9": make_projection("prolora", 0.9),
    "lora-x 0.9": make_projection("lora-x", 0.9),
    "blocks 0.9": make_projection("blocks", 0.9),
    "casa": arbitrate,
    "casa, arbitration alone": functools.partial(arbitrate, gives_drift_back=False),
    "extracted": extract_difference,
}
NOT_RUN = {
    "AdamW on the same predictions": "not written yet for this network",
    "fit": "a fit moves linear layers; what these LoRAs are on are convolutions, most of them",
}
SAMPLED = ("copy @ 1", "auto", "prolora 0.9", "delta sampling", "oracle")
SAMPLES, ASKED_AT_ONCE = 24, 8

Answer = Callable[[Tensor, Tensor, Tensor], Tensor]


def score_lora(
    bases: tuple[Network, Network],
    loras: tuple[Updates, Updates],
    idea: str,
    maps: Maps,
    questions: int,
) -> dict[str, Any]:
    """{"losses", "shares", "samples", "verdict"} of one LoRA.

    A loss is the squared error on held-out questions, over that of the target without a LoRA. A
    share is what a method takes away of it, over what the oracle does.

    Args:
        bases: source and target.
        loras: the source's, and that trained on the target.
        idea: of both.
        maps: the heightfields.
        questions: how many are held out.
    """
    target = bases[1]
    case = make_case(bases, loras[0])
    asked = maps.draw(True, questions, torch.Generator().manual_seed(1))
    plain, wanted = split_run(lambda *batch: ask_base(target, idea, Batch(*batch)), asked)
    updates = {f"copy @ {s:g}": scale_updates(copy_updates(case), s) for s in STRENGTHS}
    updates |= {label: method(case) for label, method in METHODS.items()}
    updates["oracle"] = loras[1]
    answers: dict[str, Answer] = {
        label: functools.partial(answer_with, target, moved) for label, moved in updates.items()
    }
    answers["delta sampling"] = functools.partial(answer_by_delta, bases, loras[0])
    full = (plain - wanted).square().mean()
    losses = {"none": 1.0}
    for label, answer in answers.items():
        (found,) = split_run(lambda *batch, answer=answer: (answer(*batch),), asked)
        losses[label] = float((found - wanted).square().mean() / full)
    gap = 1 - losses["oracle"]
    return {
        "losses": losses,
        "shares": {label: (1 - loss) / gap for label, loss in losses.items()},
        "best fixed copy": max(updates, key=lambda one: -losses[one] if "copy" in one else -1e9),
        "samples": {label: sample_distances(target, answers[label], idea) for label in SAMPLED}
        | {"none": sample_distances(target, target, idea)},
        "verdict": vars(judge_bases(case)) | {"go": judge_bases(case).go},
        "not run": NOT_RUN,
    }


def make_case(bases: tuple[Network, Network], lora: Updates) -> Case:
    """The modules of the LoRA in both networks, convolutions as out × in·kh·kw."""
    sides = (
        {name: base.get_submodule(name).weight.data.flatten(1).contiguous() for name in lora}
        for base in bases
    )
    return Case(*sides, lora, {})


def split_run(run: Callable[..., tuple[Tensor, ...]], asked: Batch) -> tuple[Tensor, ...]:
    """What a function of a batch gives for many questions, a few at a time."""
    with torch.no_grad():
        parts = [run(*part) for part in zip(*(t.split(ASKED_AT_ONCE) for t in asked), strict=True)]
    return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))


@contextlib.contextmanager
def with_updates(network: Network, updates: Updates) -> Iterator[Network]:
    """The network with the updates in its weights, for a while."""
    kept = {name: network.get_submodule(name).weight.data.clone() for name in updates}
    try:
        for name, update in updates.items():
            weight = network.get_submodule(name).weight.data
            weight += update.dense().reshape(weight.shape)
        yield network
    finally:
        for name, weight in kept.items():
            network.get_submodule(name).weight.data.copy_(weight)


def answer_with(network: Network, updates: Updates, *asked: Tensor) -> Tensor:
    with with_updates(network, updates):
        return network(*asked)


def answer_by_delta(bases: tuple[Network, Network], lora: Updates, *asked: Tensor) -> Tensor:
    """Delta Sampling (arXiv 2512.03056): the target's answer and the change of the source's."""
    source, target = bases
    return target(*asked) + answer_with(source, lora, *asked) - source(*asked)


def sample_distances(target: Network, answer: Answer, idea: str) -> dict[str, float]:
    """How far samples are from the target's own with the idea done to them, by statistic."""
    difficulty = torch.linspace(0, 1, SAMPLES)
    if idea in CHANGES:
        wanted = CHANGES[idea](sample_terrains(target, difficulty, 0)).clamp(-1, 1)
    else:
        wanted = sample_terrains(target, torch.full_like(difficulty, STEEP), 0)
    found = measure_terrains(sample_terrains(answer, difficulty, 0))
    return {name: distance(found[name], one) for name, one in measure_terrains(wanted).items()}
