"""Trains and scores the whole study: ``python bench/quality/study.py --work DIR``. It resumes.

Run it in several processes at once to use several cores, one thread each (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import torch
from ceiling import fit_strengths
from contenders import CHOSEN, METHODS, pair_modules
from jobs import Job, run_jobs
from judge import Judge, accuracy, train_judge
from networks import backbone, new_model
from safetensors.torch import load_file, save_file
from scoring import (
    SAMPLED,
    apply_updates,
    cases,
    chosen_rows,
    held_out_pairs,
    loss_rows,
    sample_scores,
)
from torch import nn
from training import ADAPTERS, FRESH, KINDS, VARIANTS, task_loss, train_base, train_lora

import prolora
from prolora import LowRank

SEEDS = (0, 1, 2)
ARCHS = ("unet", "flux")


def model_path(root: Path, arch: str, kind: str, seed: int) -> Path:
    return root / arch / f"{kind}-{seed}.safetensors"


def lora_path(root: Path, arch: str, kind: str, seed: int, adapter: str) -> Path:
    """The adapter `seed` of the source, or the oracle of a target with that seed."""
    return root / arch / f"{kind}-{seed}-{adapter}.safetensors"


def load_model(root: Path, arch: str, kind: str, seed: int) -> nn.Module:
    model = new_model(arch, kind)
    model.load_state_dict(load_file(model_path(root, arch, kind, seed)))
    return model.eval().requires_grad_(False)


def load_lora(path: Path) -> dict[str, LowRank]:
    """{module: update} of a stored adapter."""
    stored = load_file(path)
    names = [key.removesuffix(".up") for key in stored if key.endswith(".up")]
    return {name: LowRank(stored[name + ".up"], stored[name + ".down"]) for name in names}


def make_base(root: Path, arch: str, kind: str, seed: int, out: Path) -> None:
    source = None if kind == "source" else load_model(root, arch, "source", 0)
    save_file(train_base(arch, kind, seed, source).state_dict(), out)


def make_lora(root: Path, arch: str, kind: str, base: int, adapter: str, out: Path, seed: int):
    updates = train_lora(arch, kind, adapter, seed, load_model(root, arch, kind, base))
    parts = {f"{name}.up": update.up for name, update in updates.items()}
    parts |= {f"{name}.down": update.down for name, update in updates.items()}
    save_file({name: part.contiguous() for name, part in parts.items()}, out)


def targets() -> list[tuple[str, str, int]]:
    """Every (arch, kind, seed) that LoRAs are moved to, the most telling first."""
    related = [kind for kind in KINDS if kind not in FRESH]
    targets_by_seed = [(arch, kind, 0) for kind in (*related, "independent") for arch in ARCHS]
    targets_by_seed += [("flux", kind, 0) for kind in VARIANTS]
    targets_by_seed += [
        (arch, kind, seed) for seed in SEEDS[1:] for kind in related for arch in ARCHS
    ]
    fresh = [(arch, kind, seed) for kind in FRESH[1:] for seed in SEEDS for arch in ARCHS]
    fresh.sort(key=lambda target: target[0])  # the transformers cost a third of the UNets
    return targets_by_seed + [target for target in fresh if target not in targets_by_seed]


def training_jobs(root: Path) -> list[Job]:
    """Every base and adapter, sources before what hangs on them."""
    jobs = []
    for arch in ARCHS:
        path = model_path(root, arch, "source", 0)
        jobs.append(Job(path, (), functools.partial(make_base, root, arch, "source", 0)))
    seen = set()
    for arch, kind, seed in targets():
        bases = [(kind, seed)] if (arch, seed) in seen else [("source", 0), (kind, seed)]
        seen.add((arch, seed))
        for base, number in bases:
            path = model_path(root, arch, base, number)
            if base != "source":
                needs = (model_path(root, arch, "source", 0),)
                jobs.append(Job(path, needs, functools.partial(make_base, root, arch, kind, seed)))
            for adapter in ADAPTERS:
                made = lora_path(root, arch, base, seed, adapter)
                run = functools.partial(make_lora, root, arch, base, number, adapter, seed=seed)
                jobs.append(Job(made, (path,), run))
    return jobs


def make_judge(out: Path) -> None:
    judge = train_judge()
    print("the judge is right about content, style, domain:", accuracy(judge), flush=True)
    save_file(judge.state_dict(), out)


def load_judge(root: Path) -> Judge:
    judge = Judge()
    judge.load_state_dict(load_file(root / "judge.safetensors"))
    return judge.eval().requires_grad_(False)


def loaded(root: Path, arch: str, kind: str, seed: int) -> tuple[nn.Module, dict, dict]:
    """A target, its Case for every adapter, and its oracles."""
    source, target = load_model(root, arch, "source", 0), load_model(root, arch, kind, seed)
    loras = {a: load_lora(lora_path(root, arch, "source", seed, a)) for a in ADAPTERS}
    oracles = {a: load_lora(lora_path(root, arch, kind, seed, a)) for a in ADAPTERS}
    return target, cases(arch, kind, source, target, loras), oracles


def score_losses(root: Path, arch: str, kind: str, seed: int, out: Path) -> None:
    target, cases_by_adapter, oracles = loaded(root, arch, kind, seed)
    out.write_text(json.dumps(loss_rows(kind, target, cases_by_adapter, oracles), indent=1))


def score_chosen(root: Path, arch: str, kind: str, seed: int, out: Path) -> None:
    target, cases_by_adapter, _ = loaded(root, arch, kind, seed)
    cases_by_adapter = {adapter: case for adapter, case in cases_by_adapter.items() if case.updates}
    out.write_text(json.dumps(chosen_rows(kind, target, cases_by_adapter), indent=1))


def score_ceiling(root: Path, arch: str, kind: str, seed: int, out: Path) -> None:
    """Held-out loss of the copy with strengths fitted to the target, for every adapter."""
    target, cases_by_adapter, _ = loaded(root, arch, kind, seed)
    pairs = held_out_pairs(target)
    table = {}
    for adapter, case in cases_by_adapter.items():
        with apply_updates(target, fit_strengths(kind, adapter, target, case.updates)):
            table[adapter] = task_loss(target, kind, adapter, pairs)
    out.write_text(json.dumps(table, indent=1))


def score_samples(root: Path, arch: str, kind: str, seed: int, out: Path) -> None:
    target, cases_by_adapter, oracles = loaded(root, arch, kind, seed)
    judge = load_judge(root)
    table = {}
    for adapter, case in cases_by_adapter.items():
        known = METHODS | CHOSEN
        moved = {label: known[label](case) for label in SAMPLED} if case.updates else {}
        table[adapter] = sample_scores(judge, target, adapter, moved, oracles[adapter])
    out.write_text(json.dumps(table, indent=1))


def score_relation(root: Path, arch: str, kind: str, seed: int, out: Path) -> None:
    """How alike the two bases are, as `prolora compare` measures it; or why it cannot say."""
    source, target = load_model(root, arch, "source", 0), load_model(root, arch, kind, seed)
    pairs = pair_modules(arch, kind, source, target)
    if pairs:
        cases_by_adapter = prolora.compare(backbone(source), backbone(target), match=pairs)
        comparison = cases_by_adapter.to_dict()
    else:
        comparison = {"refused": "no module of equal shape"}
    out.write_text(json.dumps(comparison, indent=1))


def scoring_jobs(root: Path) -> list[Job]:
    """Losses and samples of every target."""
    jobs = [Job(root / "judge.safetensors", (), make_judge)]
    for arch, kind, seed in targets():
        needs = [model_path(root, arch, "source", 0), model_path(root, arch, kind, seed)]
        for base in ("source", kind):
            needs += [lora_path(root, arch, base, seed, a) for a in ADAPTERS]
        scores = [score_losses, score_relation, score_chosen]
        if kind in KINDS:
            scores.append(score_samples)
        if kind in KINDS and kind not in FRESH and seed == 0:
            scores.append(score_ceiling)
        for score in scores:
            out = root / arch / f"{kind}-{seed}-{score.__name__.removeprefix('score_')}.json"
            run = functools.partial(score, root, arch, kind, seed)
            jobs.append(Job(out, (root / "judge.safetensors", *needs), run))
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and scores")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # What is ready to be scored comes first, so that early results can be looked at.
    scoring = scoring_jobs(options.work)
    late = [job for job in scoring if job.path.match("unet/*-[12]-samples.json")]
    early = [job for job in scoring if job not in late]
    run_jobs([*early, *training_jobs(options.work), *late])


if __name__ == "__main__":
    main()
