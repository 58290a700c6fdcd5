"""What a fit asks, and what it takes its steps by, on the shipped icons.

``python bench/quality/asked_icons.py --judge FILE`` fills bench/results/asked_icons.json row by row
(it resumes), and the tables of docs/fit_measured.md. Models and LoRAs are those of
examples/icon_family.
Every row fits 768 samples of 24 images of 10 steps from each of source, source with LoRA and
target, at rank 32. `score` is the share of the held-out loss between no LoRA and one trained on the
target for 90 steps that is recovered, `near` the same of the distance of samples from that LoRA's
(squared MMD of a classifier's features), `named` the share of samples in which the classifier sees
what was asked for.

- *optimisers*: 16 Gauss-Newton steps; AdamW for as long (processor time); 8 steps, then AdamW.
- *ways*: the sampler's own states, or the images with fresh noise, at the sampler's times or at
  uniform ones, with half of the samples without a prompt or a tenth. 16 Gauss-Newton steps.
- *prompts*: none, the trigger alone, those made from a header, and those of somebody who knows
  what the LoRA is for. Images with fresh noise. `elsewhere` is the share of what the LoRA changes
  of the source at prompts without the trigger that the target follows.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from adamw import fit_by_adamw
from contenders import Updates
from evidence import ROOT, fill_page
from fitted_icons import Yard, choose_world, measure
from guiding import guide_source
from icons.catalogue import CONCEPT
from icons.words import GROUND, INK, STYLE, WHAT, all_prompts, prompt_parts, read_prompt
from judge import Judge, mmd, train_judge
from probing import Sampler
from results import git
from scoring import STUDENT_STEPS, apply_updates, sample_images
from tables import format_table
from torch import Tensor
from worlds import backbone

from prolora.adapters.training_words import CaptionedFolder, TrainingWords
from prolora.core.lowrank import LowRank
from prolora.probe.default_prompts import derive_prompts
from prolora.probe.fitting.joint_fit import JointFit, JointProblem, fit_jointly
from prolora.probe.fitting.linearisation import ProbeBatch
from prolora.probe.recording.trajectories import Call, output_of, record_calls
from prolora.probe.recording.translation import Question, Translation
from prolora.probe.recording.wanted import wanted_changes

IMAGES, SAMPLER_STEPS, SAMPLES, BATCH, STEPS, RANK = 24, 10, 768, 48, 16, 32
States = tuple[Tensor, Tensor, Tensor]
"""Images [n, 3, 24, 24], times [n] and tokens [n, 4, 64]."""
WAYS = {
    "states, half free": ("states", "sampler", 0.5),
    "states, a tenth free": ("states", "sampler", 0.1),
    "fresh noise, half free": ("fresh", "sampler", 0.5),
    "fresh noise, a tenth free": ("fresh", "sampler", 0.1),
    "fresh noise, uniform times, a tenth free": ("fresh", "uniform", 0.1),
    "fresh noise, uniform times, half free": ("fresh", "uniform", 0.5),
}
"""Way -> states or images, times, and the share of samples without a prompt."""
RESULTS = ROOT / "bench/results/asked_icons.json"
BEFORE, NOW = "states, half free", "states, a tenth free"
RENOISED = "fresh noise, uniform times, a tenth free"
SHORT = {way: way.replace(", uniform times", "") for way in (BEFORE, NOW, RENOISED)}
OPTIMISERS = ("fit", "AdamW", "fit, then AdamW")
PROMPTS = ("none", "the trigger alone", "from the header", "as typed")


@functools.cache
def learn_to_judge(kept: Path) -> Judge:
    """The classifier, trained once."""
    judge = Judge(choose_world())
    if not kept.exists():
        torch.save(train_judge(choose_world()).state_dict(), kept)
    judge.load_state_dict(torch.load(kept))
    return judge.eval().requires_grad_(False)


def draw(yard: Yard, updates: Updates, judge: Judge, seed: int) -> tuple[Tensor, float]:
    """Features of samples with updates, and the share that shows what was asked for."""
    world = choose_world()
    with apply_updates(yard.target, updates):
        images, y = sample_images(world, yard.kind, yard.target, yard.adapter, seed)
    features, content, _, _ = judge(images)
    return features, float((content.argmax(1) == world.content(y)).float().mean())


@functools.cache
def draw_ends(yard: Yard, judge: Judge) -> tuple[Tensor, float]:
    """Features with the LoRA that sets the scale, and how far samples without any are from them."""
    reference, _ = draw(yard, yard.oracle, judge, 1)
    return reference, mmd(draw(yard, {}, judge, 0)[0], reference)


def score(yard: Yard, updates: Updates, judge: Judge) -> dict[str, float]:
    """See the module; names as in diffusers."""
    reference, far = draw_ends(yard, judge)
    features, named = draw(yard, updates, judge, 0)
    with apply_updates(yard.target, updates):
        loss = yard.lesson.held_out(yard.target)
    return {
        "score": round((yard.none - loss) / (yard.none - yard.best), 4),
        "near": round(1 - mmd(features, reference) / far, 4),
        "named": round(named, 4),
    }


def draw_prompts(name: str, yard: Yard, count: int, generator: torch.Generator) -> Tensor:
    """Prompts [count] of one of PROMPTS."""
    world = choose_world()
    plain = world.draw_prompts(count, generator, False)
    if name == "as typed":
        return world.draw_prompts(count, generator, yard.adapter == "concept")
    if name == "none":
        return world.null_like(plain)
    _, *others = prompt_parts(plain)
    called = torch.tensor([_say(CONCEPT, *words) for words in torch.stack(others, 1).tolist()])
    if name == "the trigger alone":
        return called
    made = derive_prompts(header_words())
    order = torch.randperm(count, generator=generator).tolist()
    numbers = [_read(made[i % len(made)], called[i], plain[i]) for i in order]
    return torch.tensor(numbers)


def _say(what: str, style: int, ink: int, ground: int) -> int:
    return read_prompt(f"{what} {STYLE[style]} {INK[ink]} on-{GROUND[ground]}")


def _read(text: str, called: Tensor, plain: Tensor) -> int:
    """A made prompt in the world's words; a scene is any prompt, with the trigger or without."""
    words = set(text.split(", "))
    if CONCEPT not in words:
        return int(plain)
    _, style, ink, ground = (int(part) for part in prompt_parts(called))
    named = [
        next((w for w in some if w in words), some[i])
        for some, i in ((STYLE, style), (INK, ink), (GROUND, ground))
    ]
    number = read_prompt(f"{CONCEPT} {named[0]} {named[1]} on-{named[2]}")
    return number if number in set(all_prompts().tolist()) else int(called)


def header_words() -> TrainingWords:
    """What a trainer would have written of the concept's images: tags by frequency."""
    y = choose_world().images("source", "concept", "train")[1]
    counts: dict[str, int] = {}
    for names, part in zip((WHAT, STYLE, INK, GROUND), prompt_parts(y), strict=True):
        for i in part.tolist():
            counts[names[i]] = counts.get(names[i], 0) + 1
    ordered = dict(sorted(counts.items(), key=lambda item: -item[1]))
    return TrainingWords("", (CaptionedFolder(len(y), ordered),))


@functools.cache
def sample(kind: str, adapter: str, prompts: str, seed: int) -> list[tuple[str, States, States]]:
    """Of every origin: its name, states of its sampler, and images (at time 0)."""
    yard, world = measure(kind, adapter), choose_world()
    parts = []
    for i, origin in enumerate(("source", "adapted", "target")):
        model = yard.target if origin == "target" else yard.source
        guidance = world.guidance_of(kind) if origin == "target" else world.guidance
        few = origin == "target" and world.distilled.get(kind) == "lines"
        steps = STUDENT_STEPS if few else SAMPLER_STEPS
        generator = torch.Generator().manual_seed(10 * seed + i)
        y = draw_prompts(prompts, yard, IMAGES, generator)
        sampler = Sampler(world, model, adapter, IMAGES, steps, guidance=guidance)
        sampler.world = dataclasses.replace(world, draw_prompts=lambda *_, y=y: y)
        with apply_updates(model, yard.lora if origin == "adapted" else {}):
            calls = record_calls(model, sampler, 10 * seed + i, origin)
            images = world.sample(model, y, steps, guidance, 10 * seed + i)
        x, t, tokens = (torch.cat(part) for part in zip(*(c.args[:3] for c in calls), strict=True))
        with torch.no_grad():
            states = (x, t, tokens), (images, torch.zeros(IMAGES), world.tokens(model, y))
        parts.append((origin, *states))
    return parts


@functools.cache
def ask_elsewhere(yard: Yard) -> list[ProbeBatch]:
    """Noised images of the source and their prompts, none of them with the concept."""
    world, generator = choose_world(), torch.Generator().manual_seed(77)
    y = world.draw_prompts(2 * BATCH, generator, False)
    clean = world.sample(yard.source, y, SAMPLER_STEPS, world.guidance, 77)
    t = torch.rand(len(y), generator=generator)
    s = t[:, None, None, None]
    x = (1 - s) * clean + s * torch.randn(clean.shape, generator=generator)
    with torch.no_grad():
        call = Call((x, SCALE * t, world.tokens(yard.source, y)), {}, "source")
    lora = {f"backbone.{name}": update for name, update in yard.lora.items()}
    asked = wanted_changes(yard.source, yard.target, lora, [Question(call, call)], Translation())
    return [ProbeBatch(w.call, w.plain, w.plain + w.change) for w in asked]


@torch.no_grad()
def follow_elsewhere(yard: Yard, updates: Updates) -> float:
    """Share of the source's change at other prompts that the target follows."""
    (probe,) = ask_elsewhere(yard)
    with apply_updates(yard.target, updates):
        left = probe.wanted - output_of(yard.target(*probe.call.args))
    return 1 - float(left.square().sum() / (probe.wanted - probe.plain).square().sum())


@functools.cache
def ask(yard: Yard, way: str, prompts: str, seed: int) -> tuple[list[ProbeBatch], float]:
    """The probes of a fit, and the processor seconds of asking."""
    started = time.process_time()
    kind, times, free = WAYS[way]
    world = choose_world()
    guidance = guide_source(world, yard.source, yard.kind, yard.adapter)
    free = 0.0 if guidance else free
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        null = world.tokens(yard.source, torch.tensor([world.null_prompt]))[0]
    rows = []
    for _, states, images in sample(yard.kind, yard.adapter, prompts, seed):
        count = SAMPLES // 3
        x, t, tokens = states
        has_prompt = (tokens != null).flatten(1).any(1)
        wants = torch.rand(count, generator=generator) >= free
        with_prompt, without = (torch.nonzero(k)[:, 0] for k in (has_prompt, ~has_prompt))
        if kind == "states":
            pools = [pool if len(pool) else torch.arange(len(x)) for pool in (without, with_prompt)]
            picked = torch.stack(
                [pool[torch.randint(len(pool), (count,), generator=generator)] for pool in pools]
            )
            chosen = picked[wants.long(), torch.arange(count)]
            rows.append((x[chosen], t[chosen], tokens[chosen]))
            continue
        image = torch.randint(IMAGES, (count,), generator=generator)
        levels = torch.rand(count, generator=generator)
        if times == "sampler":
            levels = t[torch.randint(len(t), (count,), generator=generator)] / SCALE
        clean, noise = images[0][image], torch.randn(count, *world.shape, generator=generator)
        s = levels[:, None, None, None]
        said = torch.where(wants[:, None, None], images[2][image], null)
        rows.append(((1 - s) * clean + s * noise, SCALE * levels, said))
    every = [torch.cat(part) for part in zip(*rows, strict=True)]
    order = torch.randperm(len(every[0]), generator=generator)
    questions = []
    for part in order.split(BATCH):
        call = Call(tuple(value[part] for value in every), {}, "mixed")
        questions.append(Question(call, call))
    lora = {f"backbone.{name}": update for name, update in yard.lora.items()}
    asked = wanted_changes(
        yard.source, yard.target, lora, questions, Translation(guidance=guidance)
    )
    probes = [ProbeBatch(w.call, w.plain, w.plain + w.change) for w in asked]
    return probes, time.process_time() - started


SCALE = 1000.0
"""What the models are given as time 1."""


def pose(yard: Yard, probes: list[ProbeBatch], steps: int) -> JointProblem:
    """The problem that all optimisers solve."""
    pattern = choose_world().adapted["flux"]
    modules = backbone(yard.target).named_modules()
    names = [f"backbone.{name}" for name, _ in modules if re.fullmatch(pattern, name)]
    batches = itertools.cycle(probes)
    return JointProblem(yard.target, names, output_of, lambda: [next(batches)], steps, 1.0, RANK)


def copied(yard: Yard) -> dict[str, LowRank]:
    """The LoRA on the modules of the target that the source has too."""
    there = dict(backbone(yard.target).named_modules())
    return {f"backbone.{name}": update for name, update in yard.lora.items() if name in there}


def fit(
    yard: Yard, probes: list[ProbeBatch], start: str, optimiser: str, budget: float
) -> tuple[JointFit, float]:
    """A fit, and its processor seconds; AdamW takes as many steps as fit into `budget` seconds."""
    initial = copied(yard) if start == "copy" else {}
    started = time.process_time()
    if optimiser == "fit":
        found = fit_jointly(pose(yard, probes, STEPS), initial)
        return found, time.process_time() - started
    if optimiser == "fit, then AdamW":
        first = fit_jointly(pose(yard, probes, STEPS // 2), initial)
        initial, budget = first.updates, budget - (time.process_time() - started)
    trial = time.process_time()
    fit_by_adamw(pose(yard, probes, 2), initial)
    spent = time.process_time() - trial
    steps = max(round(2 * budget / spent), 1)
    found = fit_by_adamw(pose(yard, probes, steps), initial)
    return found, time.process_time() - started - spent


def list_rows() -> Iterator[dict[str, Any]]:
    """What is measured, on one seed or two."""
    some = [
        ("pruned", "concept", "zero"),
        ("pruned", "concept", "copy"),
        ("pruned", "neon", "zero"),
    ]
    more = [*some, ("pruned", "neon", "copy"), ("few-step", "concept", "copy")]

    def row(case: tuple[str, str, str], way: str, seed: int, **asked: str) -> dict[str, Any]:
        known = dict(zip(("target", "adapter", "start"), case, strict=True))
        known |= {"prompts": "as typed", "optimiser": "fit", "way": way, "seed": seed}
        return known | asked

    for seed in (0, 1):
        yield from (row(case, way, seed) for case in some for way in WAYS)
        yield from (row(c, RENOISED, seed, prompts=p) for p in PROMPTS for c in some[:2])
    for way, cases, seed in (
        (BEFORE, more, 0),
        (RENOISED, more, 0),
        (NOW, some, 0),
        (NOW, some, 1),
    ):
        yield from (row(case, way, seed, optimiser=o) for case in cases for o in OPTIMISERS)


def run(row: dict[str, Any], judge: Judge, budget: float) -> dict[str, Any]:
    """One row."""
    yard = measure(row["target"], row["adapter"])
    probes, asking = ask(yard, row["way"], row["prompts"], row["seed"])
    found, seconds = fit(yard, probes, row["start"], row["optimiser"], budget)
    updates = {name.removeprefix("backbone."): u for name, u in found.updates.items()}
    facts = {"steps": len(found.history), "seconds": round(seconds, 1), "asking": round(asking, 1)}
    if row["adapter"] == "concept":
        facts["elsewhere"] = round(follow_elsewhere(yard, updates), 4)
    return row | score(yard, updates, judge) | facts


def tabulate(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The tables of docs/fit_measured.md, by their marks."""
    typed = [row for row in rows if row["prompts"] == "as typed"]
    fits = [row for row in typed if row["optimiser"] == "fit"]
    here = [row for row in rows if row["way"] == RENOISED and row["optimiser"] == "fit"]
    timed = [{**row, "way": SHORT[row["way"]]} for row in typed if row["way"] in SHORT]
    compared = {_name_case(row) for row in fits if row["way"] == "fresh noise, half free"}
    ways = [row for row in fits if _name_case(row) in compared]
    prompted = [row for row in here if row["adapter"] == "concept" and row["target"] == "pruned"]
    return {
        "asked ways": _lay_out(ways, "way", list(WAYS), _name_case),
        "asked optimisers": _lay_out(
            timed, "optimiser", list(OPTIMISERS), lambda r: f"{_name_case(r)}, {r['way']}", True
        ),
        "asked prompts": _lay_out(prompted, "prompts", list(PROMPTS), _name_case),
    }


def _name_case(row: dict[str, Any]) -> str:
    origin = "the copy" if row["start"] == "copy" else "zero"
    return f"{row['target']}, {row['adapter']}, from {origin}"


def _lay_out(
    rows: list[dict[str, Any]],
    by: str,
    values: list[str],
    name: Callable[[dict[str, Any]], str],
    turned: bool = False,
) -> str:
    """A line for each value and a column for each case, or the other way round."""
    cases = sorted({name(row) for row in rows})

    def cell(value: str, case: str) -> str:
        found = [row for row in rows if row[by] == value and name(row) == case]
        if not found:
            return "–"
        losses, images = (
            ", ".join(f"{row[key]:.2f}" for row in found) for key in ("score", "near")
        )
        if by == "prompts" and found[0]["start"] == "zero":
            images += " / " + ", ".join(f"{row['elsewhere']:.2f}" for row in found)
        time = f" ({sum(r['seconds'] for r in found) / len(found):.1f} s)" if turned else ""
        return f"{losses} / {images}{time}"

    if turned:
        lines = [[case, *(cell(value, case) for value in values)] for case in cases]
        return format_table(["", *values], lines)
    lines = [[value, *(cell(value, case) for case in cases)] for value in values]
    return format_table(["", *cases], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--judge", type=Path, help="keeps the classifier; none runs nothing")
    parser.add_argument("--minutes", type=float, default=25, help="of processor time, at most")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    if arguments.judge:
        measure_rows(kept, learn_to_judge(arguments.judge), 60 * arguments.minutes)
    page = ROOT / "docs/fit_measured.md"
    page.write_text(fill_page(page.read_text(), tabulate(kept["rows"])))


def measure_rows(kept: dict[str, Any], judge: Judge, seconds: float) -> None:
    """Adds the rows that are missing, as far as the processor time goes."""
    for row in list_rows():
        known = {key_of(done): done for done in kept["rows"]}
        if key_of(row) in known:
            continue
        fitted = known.get(key_of(row | {"optimiser": "fit"}), {})
        kept["rows"].append(run(row, judge, fitted.get("seconds", 0.0)))
        print(kept["rows"][-1], flush=True)
        kept["made"] = {
            "script": "bench/quality/asked_icons.py",
            "commit": git("rev-parse", "--short", "HEAD"),
            "date": git("log", "-1", "--format=%cs"),
            "torch": torch.__version__,
        }
        RESULTS.write_text(json.dumps(kept, indent=0) + "\n")
        if time.process_time() > seconds:
            return


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a row from all others."""
    return tuple(
        row[name] for name in ("target", "adapter", "start", "prompts", "optimiser", "way", "seed")
    )


if __name__ == "__main__":
    main()
