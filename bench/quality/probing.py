"""Data-free probing in the study: ``python bench/quality/probing.py --work DIR``. It resumes.

DIR holds the models and adapters that study.py trained. Every transfer leaves one JSON file in
DIR/probing; probed.py makes the tables of them. The score is the share of the held-out loss between
no LoRA and the oracle (a LoRA trained on the target) that is recovered.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from contenders import Updates
from distilling import distil_lora
from images import CONCEPT_LABEL, NULL_LABEL
from jobs import Job, run_jobs
from model import predict
from scoring import apply_updates, held_out_pairs
from study import load_lora, load_model, lora_path, model_path
from torch import Tensor, nn
from training import ADAPTERS, GUIDANCE, TOKENS, task_loss

from prolora import probe
from prolora.probe import run as room

IMAGES, STEPS, FEW_STEPS = 24, 25, 4
PREFIX = {"flux": "transformer.", "unet": ""}
"""What comes before diffusers' names in the modules that take images, times and tokens."""


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

    def __init__(
        self, model: nn.Module, adapter: str, images: int, steps: int = STEPS, few: bool = False
    ) -> None:
        """The model to run, images and steps of a run, and whether few steps are enough."""
        self.model, self.adapter, self.images = model, adapter, images
        self.steps, self.few = FEW_STEPS if few else steps, few

    @torch.no_grad()
    def __call__(self, seed: int) -> None:
        """One run from noise."""
        n = 2 * self.images if self.few else self.images
        generator = torch.Generator().manual_seed(seed)
        y = labels(self.adapter, n, generator)
        x = torch.randn(n, 1, 16, 16, generator=generator)
        times = torch.linspace(1, 0, self.steps + 1).repeat(n, 1)
        times[:, 1:-1] += (torch.rand(n, 1, generator=generator) - 0.5) / self.steps
        for i in range(self.steps):
            t, after = times[:, i], times[:, i + 1]
            if self.few:
                v = predict(self.model, x, t, TOKENS(y))
            else:
                both = torch.cat([y, torch.full_like(y, NULL_LABEL)])
                v, free = predict(
                    self.model, torch.cat([x, x]), torch.cat([t, t]), TOKENS(both)
                ).chunk(2)
                v = free + GUIDANCE * (v - free)
            x = x + (after - t)[:, None, None, None] * v


@dataclass
class Case:
    """One LoRA and one target.

    Attributes:
        root: the study's folder.
        arch: of the source.
        to: architecture of the target.
        kind: of the target.
        seed: of the target and of the LoRA.
        adapter: one of ADAPTERS.
    """

    root: Path
    arch: str
    to: str
    kind: str
    seed: int
    adapter: str

    def __post_init__(self) -> None:
        """Loads the models and both LoRAs, and scores nothing and the oracle."""
        self.source = load_model(self.root, self.arch, "source", 0)
        self.target = load_model(self.root, self.to, self.kind, self.seed)
        self.lora = load_lora(lora_path(self.root, self.arch, "source", self.seed, self.adapter))
        oracle = load_lora(lora_path(self.root, self.to, self.kind, self.seed, self.adapter))
        self.pairs = held_out_pairs(self.target) if self.adapter == "fewstep" else None
        self.none, self.best = self.loss({}), self.loss(oracle)

    def loss(self, updates: Updates) -> float:
        """Held-out loss of the target with updates, names as in diffusers."""
        with apply_updates(self.target, updates):
            return task_loss(self.target, self.kind, self.adapter, self.pairs)

    def score(self, updates: Updates) -> float:
        """Share of the gap that is recovered."""
        return (self.none - self.loss(updates)) / (self.none - self.best)

    def fits(self) -> bool:
        """Whether the LoRA can be copied as it is."""
        modules = dict(self.target.named_modules())
        modules_of_target = {name: modules.get(PREFIX[self.to] + name) for name in self.lora}
        return all(
            m is not None and m.weight.shape == self.lora[n].shape
            for n, m in modules_of_target.items()
        )

    def samplers(self, images: int, steps: int) -> tuple[Sampler, Sampler, Sampler]:
        """Of the source, of the target, and of the source with the LoRA."""
        few = self.adapter == "fewstep"
        return (
            Sampler(self.source, self.adapter, images, steps),
            Sampler(self.target, self.adapter, images, steps),
            Sampler(self.source, self.adapter, images, steps, few=few),
        )


def run_probe(
    case: Case, images: int = IMAGES, sampler_steps: int = STEPS, **options: Any
) -> dict[str, Any]:
    """One transfer by probing and what it is worth."""
    # Stages in processor time, so that other work on the machine does not count.
    room.time = SimpleNamespace(perf_counter=time.process_time)
    lora = {PREFIX[case.arch] + name: update for name, update in case.lora.items()}
    result = probe.fit_lora(
        case.source,
        case.target,
        lora,
        *case.samplers(images, sampler_steps),
        force=True,
        seed=100 * case.seed,
        **options,
    )
    verdict = result.report.gate
    assert verdict is not None
    updates = {
        name.removeprefix(PREFIX[case.to]): update
        for name, update in result.adapter.updates.items()
    }
    unweakened = {n: type(u)(u.up / verdict.strength, u.down) for n, u in updates.items()}
    return {
        "images": images,
        "sampler_steps": sampler_steps,
        **options,
        "score": case.score(updates),
        "score_at_1": case.score(unweakened),
        "copy": case.score(case.lora) if case.fits() else None,
        "decision": verdict.decision,
        "strength": verdict.strength,
        "share": verdict.share,
        "copy_share": verdict.copy_share,
        "disagreement": verdict.disagreement,
        "seconds": result.report.seconds,
        "history": result.report.steps,
        "start": result.report.start,
    }


def run_ceiling(case: Case, images: int = IMAGES, steps: int = STEPS) -> dict[str, Any]:
    """What training on the same trajectories gives; the library does not offer it."""
    started = time.process_time()
    updates, sampling = distil_lora(
        case.source,
        case.target,
        case.lora,
        case.to,
        case.samplers(images, steps),
        seed=100 * case.seed,
    )
    seconds = {"sample": sampling, "train": time.process_time() - started - sampling}
    return {"score": case.score(updates), "seconds": seconds}


def run(case: tuple[Any, ...], method: str, options: dict[str, Any], out: Path) -> None:
    """One row of the study, as a file."""
    loaded = Case(*case)
    row = run_probe(loaded, **options) if method == "probe" else run_ceiling(loaded, **options)
    names = dict(zip(("arch", "to", "kind", "seed", "adapter"), case[1:], strict=True))
    out.write_text(json.dumps(names | {"method": method} | row))


def main() -> None:
    """Scores what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of study.py")
    parser.add_argument("--pairs", nargs="+", default=["flux:flux", "unet:unet"])
    parser.add_argument("--kinds", nargs="+", default=["independent", "resized", "far"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS))
    parser.add_argument("--methods", nargs="+", default=["probe"], choices=["probe", "distilled"])
    parser.add_argument("--name", default="study", help="of this set of options")
    parser.add_argument("--options", type=json.loads, default={}, help="of probe.fit_lora, as JSON")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    jobs = []
    for seed in asked.seeds:
        for kind in asked.kinds:
            for pair in asked.pairs:
                arch, to = pair.split(":")
                for adapter in asked.adapters:
                    case = (asked.work, arch, to, kind, seed, adapter)
                    needs = (
                        model_path(asked.work, to, kind, seed),
                        lora_path(asked.work, to, kind, seed, adapter),
                        lora_path(asked.work, arch, "source", seed, adapter),
                    )
                    if not all(path.exists() for path in needs):
                        continue
                    for method in asked.methods:
                        name = f"{asked.name},{method},{arch},{to},{kind},{seed},{adapter}.json"
                        options = asked.options if method == "probe" else {}
                        make = functools.partial(run, case, method, options)
                        jobs.append(Job(asked.work / "probing" / name, needs, make))
    run_jobs(jobs)


if __name__ == "__main__":
    main()
