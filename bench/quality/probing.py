"""Data-free probing in a world: ``python bench/quality/probing.py --work DIR``. It resumes.

DIR holds the models and adapters that study.py trained. Every transfer leaves one JSON file in
DIR/probing. The score is the share of the held-out loss between
no LoRA and the oracle (a LoRA trained on the target) that is recovered; drawn.py scores samples.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from contenders import CHOSEN, Updates, pair_modules, scale_updates
from contenders import Case as Contest
from drawn import score_drawn
from flow import guided_velocity, predict
from guiding import guide_source
from imaged import record_images
from jobs import Job, run_jobs
from models import Folder, load_lora
from scoring import apply_updates, sample_images
from study import judge_job, load_judge
from torch import Tensor, nn
from worlds import NAMES, World, load_world

from prolora import probe
from prolora.probe import run as room
from prolora.probe import workload
from prolora.probe.settings import FitSettings

IMAGES, STEPS, FEW_STEPS = 24, 25, 4
STRENGTHS = (1.25, 1.5)
"""Beyond 1, that what was fitted is scored at as well; samples are drawn at the first."""


class Sampler:
    """Euler steps with guidance, the times of every image shifted within their step.

    A few-step adapter runs as its user would run it: few steps and no guidance.
    """

    def __init__(
        self,
        world: World,
        model: nn.Module,
        adapter: str,
        images: int,
        steps: int = STEPS,
        few: bool = False,
        guidance: float | None = None,
    ) -> None:
        """The model to run, images and steps of a run, and whether few steps are enough."""
        self.world, self.model, self.adapter, self.images = world, model, adapter, images
        self.steps, self.few = FEW_STEPS if few else steps, few
        self.guidance = world.guidance if guidance is None else guidance

    @torch.no_grad()
    def __call__(self, seed: int) -> None:
        """One run from noise."""
        n = 2 * self.images if self.few else self.images
        generator = torch.Generator().manual_seed(seed)
        y = self.world.draw_prompts(n, generator, self.adapter == "concept")
        x = torch.randn(n, *self.world.shape, generator=generator)
        tokens = self.world.tokens(self.model, y)
        null = self.world.tokens(self.model, self.world.null_like(y))
        times = torch.linspace(1, 0, self.steps + 1).repeat(n, 1)
        times[:, 1:-1] += (torch.rand(n, 1, generator=generator) - 0.5) / self.steps
        for i in range(self.steps):
            t, after = times[:, i], times[:, i + 1]
            if self.few or self.guidance == 1:
                v = predict(self.model, x, t, tokens)
            else:
                v = guided_velocity(self.model, x, t, tokens, null, self.guidance)
            x = x + (after - t)[:, None, None, None] * v


@dataclass
class Case:
    """One LoRA and one target.

    Attributes:
        world: of both bases.
        root: the study's folder.
        arch: of the source.
        to: architecture of the target.
        kind: of the target.
        seed: of the target and of the LoRA.
        adapter: one of the world's.
    """

    world: World
    root: Path
    arch: str
    to: str
    kind: str
    seed: int
    adapter: str

    def __post_init__(self) -> None:
        """Loads the models and both LoRAs, and scores nothing and the oracle."""
        ours, theirs = (Folder(self.world, self.root, arch) for arch in (self.arch, self.to))
        self.source = ours.load_source(self.kind, self.seed)
        self.target = theirs.load_model(self.kind, self.seed)
        self.lora = load_lora(ours.source_lora_path(self.kind, self.seed, self.adapter))
        self.oracle = load_lora(theirs.lora_path(self.kind, self.seed, self.adapter))
        self.lesson = theirs.lesson(self.kind, self.seed, self.adapter, "look", "held_out")
        self.none, self.best = self.loss({}), self.loss(self.oracle)

    def loss(self, updates: Updates) -> float:
        """Held-out loss of the target with updates, names as in diffusers."""
        with apply_updates(self.target, updates):
            return self.lesson.held_out(self.target)

    def score(self, updates: Updates) -> float:
        """Share of the gap that is recovered."""
        return (self.none - self.loss(updates)) / (self.none - self.best)

    def copied(self) -> Updates:
        """The LoRA on the modules of the target that the source has too, names as in diffusers."""
        if self.arch != self.to:
            return {}
        models = self.source, self.target
        pairs = pair_modules(self.world, self.arch, self.kind, *models)
        return {t: self.lora[s] for t, s in pairs.items() if s in self.lora}

    def drawn(self, fitted: Updates) -> dict[str, dict[str, float]]:
        """What samples say of fit, copy, `auto`, the oracle and the source with its LoRA."""
        rows = {"none": {}, "oracle": self.oracle, "fit": fitted, "source": self.lora}
        rows[f"fit @ {STRENGTHS[0]}"] = scale_updates(fitted, STRENGTHS[0])
        if copied := self.copied():
            known = (self.world, self.arch, self.kind, self.source, self.target, self.lora)
            rows |= {"copy": copied, "auto": CHOSEN["auto"](Contest.of(*known))}

        def draw(row: str, y: Tensor, seed: int) -> Tensor:
            ours = row == "source"
            model, kind = (self.source, "source") if ours else (self.target, self.kind)
            with apply_updates(model, rows[row]):
                return sample_images(self.world, kind, model, self.adapter, seed, y)[0]

        judge = load_judge(self.world, self.root)
        return score_drawn(self.world, judge, self.adapter, draw, tuple(rows))

    def samplers(self, images: int, steps: int) -> tuple[Sampler, Sampler, Sampler]:
        """Of the source, of the target, and of the source with the LoRA."""
        few, theirs = self.adapter == "fewstep", self.world.guidance_of(self.kind)
        rest = (self.adapter, images, steps)
        return (
            Sampler(self.world, self.source, *rest),
            Sampler(self.world, self.target, *rest, guidance=theirs),
            Sampler(self.world, self.source, *rest, few=few),
        )


def run_probe(
    case: Case, images: int = IMAGES, sampler_steps: int = STEPS, **options: Any
) -> dict[str, Any]:
    """One transfer by probing and what it is worth."""
    # Stages in processor time, so that other work on the machine does not count.
    workload.time = SimpleNamespace(perf_counter=time.process_time)
    lora = {case.world.prefix[case.arch] + name: update for name, update in case.lora.items()}
    copied = case.copied()
    # As by the command line: no lower rank than the LoRA's.
    rank = max(32, *(update.rank for update in lora.values()))
    rival = {case.world.prefix[case.to] + name: update for name, update in copied.items()}
    # Rows that are stored call the steps of a fit and its damping as the library did then.
    named = {"steps": "fit_steps", "damping": "curvature_damping"}
    asked = {named.get(name, name): value for name, value in options.items()}
    if case.adapter == "fewstep":
        asked["lora_steps"] = FEW_STEPS
    settings = FitSettings(**{"rank": rank, "seed": 100 * case.seed, "force": True} | asked)
    if case.world.distilled.get(case.kind) == "lines":
        recorder = record_images(case, images, sampler_steps)
        result = room.fit_from_recorder(recorder, rival, settings)
    else:
        samplers = case.samplers(images, sampler_steps)
        guidance = guide_source(case.world, case.source, case.kind, case.adapter)
        result = probe.fit_to_models(
            case.source,
            case.target,
            lora,
            probe.Samplers(*samplers),
            settings,
            translation=probe.Translation(guidance=guidance),
            rival=rival,
        )
    verdict = result.report.gate
    assert verdict is not None
    updates = {
        name.removeprefix(case.world.prefix[case.to]): update
        for name, update in result.adapter.updates.items()
    }
    unweakened = scale_updates(updates, 1 / verdict.strength)
    return {
        "images": images,
        "sampler_steps": sampler_steps,
        **options,
        "score": case.score(updates),
        "score_at_1": case.score(unweakened),
        **{f"score_at_{s}": case.score(scale_updates(unweakened, s)) for s in STRENGTHS},
        "copy": case.score(copied) if copied else None,
        "gain": asdict(verdict.gain) if verdict.gain else None,
        "decision": verdict.decision,
        "strength": verdict.strength,
        "share": verdict.share,
        "copy_share": verdict.copy_share,
        "disagreement": verdict.disagreement,
        "seconds": result.report.seconds,
        "history": result.report.steps,
        "start": result.report.start,
        "trust": result.report.trust,
        "guided": result.report.guidance,
        "by_images": result.report.crossed is not None,
        "drawn": case.drawn(unweakened),
    }


def run(case: tuple[Any, ...], options: dict[str, Any], out: Path) -> None:
    """Writes one row of the study."""
    row = run_probe(Case(*case), **options)
    names = dict(zip(("arch", "to", "kind", "seed", "adapter"), case[2:], strict=True))
    out.write_text(json.dumps(names | {"method": "probe"} | row))


def main() -> None:
    """Scores what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=NAMES, default=NAMES[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of study.py")
    parser.add_argument("--pairs", nargs="+", default=["flux:flux", "unet:unet"])
    parser.add_argument("--kinds", nargs="+", default=["independent", "resized", "far"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--adapters", nargs="+", help="all of the world's unless given")
    parser.add_argument("--name", default="study", help="of this set of options")
    parser.add_argument("--options", type=json.loads, default={}, help="of the fit, as JSON")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    world = load_world(asked.world)
    jobs = [judge_job(world, asked.work)]
    for seed in asked.seeds:
        for kind in asked.kinds:
            for pair in asked.pairs:
                arch, to = pair.split(":")
                ours, theirs = (Folder(world, asked.work, a) for a in (arch, to))
                for adapter in asked.adapters or world.adapters_for(kind):
                    case = (world, asked.work, arch, to, kind, seed, adapter)
                    needs = (
                        asked.work / "judge.safetensors",
                        theirs.model_path(kind, seed),
                        theirs.lora_path(kind, seed, adapter),
                        ours.source_lora_path(kind, seed, adapter),
                    )
                    if not all(path.exists() for path in needs[1:]):
                        continue
                    name = f"{asked.name},probe,{arch},{to},{kind},{seed},{adapter}.json"
                    make = functools.partial(run, case, asked.options)
                    jobs.append(Job(asked.work / "probing" / name, needs, make))
    run_jobs(jobs)


if __name__ == "__main__":
    main()
