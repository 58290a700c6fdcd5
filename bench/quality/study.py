"""Trains and scores a world: ``python bench/quality/study.py --world icons --work DIR``; resumes.

Run it in several processes at once to use several cores, one thread each (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import torch
from contenders import METHODS, Case, make_cases
from jobs import Job, run_jobs
from judge import Judge, train_judge
from models import BASE_SEED, Folder, load_lora
from safetensors.torch import load_file, save_file
from scoring import SAMPLED, Yardstick, loss_rows, sample_scores
from torch import nn
from worlds import NAMES, World, load_world

SEEDS = (0, 1, 2)
ARCHS = ("flux", "unet")


def targets(world: World) -> list[tuple[str, str, int]]:
    """Every (arch, kind, seed) that LoRAs are moved to, the most telling first.

    The transformers cost a third to half of the UNets.
    """
    return [
        (arch, kind, seed)
        for seed in SEEDS
        for arch in ARCHS
        for kind in world.kinds
        if seed == SEEDS[0] or kind not in world.once
    ] + [("flux", kind, world.variants_seed) for kind in world.variants]


def training_jobs(world: World, root: Path) -> list[Job]:
    """Every base and adapter, sources before what hangs on them, each once."""
    jobs: dict[Path, Job] = {}

    def add_base(folder: Folder, kind: str, seed: int) -> None:
        path = folder.model_path(kind, seed)
        run = functools.partial(folder.make_base, kind, seed)
        jobs.setdefault(path, Job(path, folder.base_needs(kind, seed), run))

    def add_lora(folder: Folder, kind: str, seed: int, adapter: str) -> None:
        path = folder.lora_path(kind, seed, adapter)
        run = functools.partial(folder.make_lora, kind, seed, adapter)
        jobs.setdefault(path, Job(path, folder.lora_needs(kind, seed, adapter), run))

    def add_target(folder: Folder, kind: str, seed: int) -> None:
        for name in world.merged.get(kind, ((), 0))[0]:
            add_lora(folder, "source", seed, name)
        for part in world.blended.get(kind, {}):
            add_base(folder, part, seed)
        add_base(folder, kind, seed)
        for adapter in world.adapters_for(kind):
            add_lora(folder, kind, seed, adapter)

    for arch in ARCHS:
        add_base(Folder(world, root, arch), "source", BASE_SEED)
    for arch, kind, seed in targets(world):
        folder = Folder(world, root, arch)
        for adapter in world.adapters:
            add_lora(folder, "source", seed, adapter)
        if world.source_of(kind) != "source":
            add_target(folder, world.source_of(kind), seed)
        add_target(folder, world.model_of(kind), seed)
    return list(jobs.values())


def judge_job(world: World, root: Path) -> Job:
    """The classifier that scores samples."""

    def make_judge(out: Path) -> None:
        save_file(train_judge(world).state_dict(), out)

    return Job(root / "judge.safetensors", (), make_judge)


def load_judge(world: World, root: Path) -> Judge:
    judge = Judge(world)
    judge.load_state_dict(load_file(root / "judge.safetensors"))
    return judge.eval().requires_grad_(False)


def open_target(
    folder: Folder, kind: str, seed: int
) -> tuple[nn.Module, dict[str, Case], Yardstick]:
    """A target, its Case for every adapter, and what the adapters mean in the target's look."""
    world, adapters = folder.world, folder.world.adapters_for(kind)
    source, target = folder.load_source(kind, seed), folder.load_model(kind, seed)
    loras = {a: load_lora(folder.source_lora_path(kind, seed, a)) for a in adapters}
    oracles = {a: load_lora(folder.lora_path(kind, seed, a)) for a in adapters}
    stick = Yardstick({a: folder.lesson(kind, seed, a, "held_out") for a in adapters}, oracles)
    return target, make_cases(world, folder.arch, kind, (source, target), loras), stick


def score_losses(folder: Folder, kind: str, seed: int, out: Path) -> None:
    out.write_text(json.dumps(loss_rows(*open_target(folder, kind, seed)), indent=1))


def score_samples(folder: Folder, kind: str, seed: int, out: Path) -> None:
    target, cases, stick = open_target(folder, kind, seed)
    judge = load_judge(folder.world, folder.root)
    table = {}
    for adapter, case in cases.items():
        moved = {label: METHODS[label](case) for label in SAMPLED} if case.updates else {}
        table[adapter] = sample_scores(
            folder.world, judge, kind, target, adapter, moved, stick.oracles[adapter]
        )
    out.write_text(json.dumps(table, indent=1))


def scoring_jobs(world: World, root: Path) -> list[Job]:
    """Losses and samples of every target."""
    judge, jobs = judge_job(world, root).path, []
    for arch, kind, seed in targets(world):
        folder = Folder(world, root, arch)
        needs = [folder.model_path(world.source_of(kind), seed), folder.model_path(kind, seed)]
        for adapter in world.adapters_for(kind):
            needs.append(folder.source_lora_path(kind, seed, adapter))
            needs.append(folder.lora_path(kind, seed, adapter))
        scores = {"losses": (score_losses, needs)}
        if kind in world.kinds and seed in world.sampled_seeds:
            scores["samples"] = score_samples, [judge, *needs]
        for name, (score, after) in scores.items():
            out = root / arch / f"{kind}-{seed}-{name}.json"
            jobs.append(Job(out, tuple(after), functools.partial(score, folder, kind, seed)))
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=NAMES, default=NAMES[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and scores")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = load_world(options.world)
    # What is ready to be scored comes first, so that early results can be looked at.
    scoring, training = scoring_jobs(world, options.work), training_jobs(world, options.work)
    late = [job for job in scoring if job.path.match("*-samples.json")]
    early = [job for job in scoring if job not in late]
    run_jobs([*early, *training, judge_job(world, options.work), *late])


if __name__ == "__main__":
    main()
