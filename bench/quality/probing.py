"""Scores data-free probing: ``python bench/quality/probing.py --work DIR --arch flux ...``.

DIR holds the models and adapters that study.py trained. One JSON line per adapter: the score
(share of the loss between no LoRA and the oracle that is recovered), the gate's verdict, seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from images import CONCEPT_LABEL, NULL_LABEL
from model import predict
from networks import backbone
from scoring import applied, held_out_pairs
from study import load_lora, load_model, lora_path
from torch import Tensor, nn
from training import ADAPTERS, GUIDANCE, TOKENS, task_loss

from prolora import probe

STEPS, FEW_STEPS = 8, 4


def labels(adapter: str, n: int, generator: torch.Generator) -> Tensor:
    """What a user would prompt: the ten digits, and mostly the concept's token for a concept."""
    y = torch.randint(10, (n,), generator=generator)
    if adapter != "concept":
        return y
    return torch.where(torch.rand(n, generator=generator) < 0.7, CONCEPT_LABEL, y)


class Sampler:
    """Euler steps with guidance, the times of every image shifted within their step.

    A few-step adapter runs as its user would run it: few steps and no guidance.
    """

    def __init__(self, model: nn.Module, adapter: str, images: int, few: bool = False) -> None:
        """The model to run, the images of a run, and whether few steps are enough."""
        self.model, self.adapter, self.images, self.few = model, adapter, images, few

    @torch.no_grad()
    def __call__(self, seed: int) -> None:
        """One run from noise."""
        steps, guidance = (FEW_STEPS, 1.0) if self.few else (STEPS, GUIDANCE)
        n = 2 * self.images if self.few else self.images
        generator = torch.Generator().manual_seed(seed)
        y = labels(self.adapter, n, generator)
        x = torch.randn(n, 1, 16, 16, generator=generator)
        times = torch.linspace(1, 0, steps + 1).repeat(n, 1)
        times[:, 1:-1] += (torch.rand(n, 1, generator=generator) - 0.5) / steps
        for i in range(steps):
            t, after = times[:, i], times[:, i + 1]
            if guidance == 1:
                v = predict(self.model, x, t, TOKENS(y))
            else:
                both = torch.cat([y, torch.full_like(y, NULL_LABEL)])
                v, free = predict(
                    self.model, torch.cat([x, x]), torch.cat([t, t]), TOKENS(both)
                ).chunk(2)
                v = free + guidance * (v - free)
            x = x + (after - t)[:, None, None, None] * v


def scored(
    root: Path, arch: str, kind: str, seed: int, adapter: str, images: int, **options: Any
) -> dict[str, Any]:
    """One transfer and what it is worth."""
    source, target = load_model(root, arch, "source", 0), load_model(root, arch, kind, seed)
    lora = load_lora(lora_path(root, arch, "source", seed, adapter))
    oracle = load_lora(lora_path(root, arch, kind, seed, adapter))
    pairs = held_out_pairs(target) if adapter == "fewstep" else None
    started = time.process_time()
    found = probe.transfer(
        backbone(source), backbone(target), lora,
        Sampler(source, adapter, images), Sampler(target, adapter, images),
        Sampler(source, adapter, images, few=adapter == "fewstep"),
        force=True, **options,
    )  # fmt: skip
    seconds = time.process_time() - started

    def loss(updates: dict) -> float:
        with applied(target, updates):
            return task_loss(target, kind, adapter, pairs)

    none, best = loss({}), loss(oracle)
    verdict = found.report.gate
    assert verdict is not None
    whole = {n: type(u)(u.up / verdict.strength, u.down) for n, u in found.adapter.updates.items()}
    return {
        "arch": arch, "kind": kind, "seed": seed, "adapter": adapter, **options,
        "score": (none - loss(found.adapter.updates)) / (none - best),
        "score_at_1": (none - loss(whole)) / (none - best),
        "decision": verdict.decision, "strength": verdict.strength, "share": verdict.share,
        "disagreement": verdict.disagreement, "cpu_seconds": seconds,
        "stages": found.report.seconds,
        "explained": [row.explained for row in found.report.blocks],
        "reached": [row.reached for row in found.report.blocks],
    }  # fmt: skip


def main() -> None:
    """Scores what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of study.py")
    parser.add_argument("--arch", default="flux")
    parser.add_argument("--kinds", nargs="+", default=["independent"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS))
    parser.add_argument("--images", type=int, default=12, help="sampled by each model")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in options.kinds:
        for seed in options.seeds:
            for adapter in options.adapters:
                row = scored(
                    options.work, options.arch, kind, seed, adapter, options.images,
                    rank=options.rank, iterations=options.iterations, rounds=options.rounds,
                )  # fmt: skip
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
