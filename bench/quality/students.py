"""Does copying turn harmful on few-step students that were distilled for long?

``python bench/quality/students.py --work DIR``; it resumes. DIR is the folder of study.py: its
source and that one's LoRAs are read, everything else goes to DIR/students. A student starts as the
source and learns where the source's sampler, with guidance, ends from each of its states, by one of
WAYS. It is stored at each length on the way. Each LoRA's oracle on it learns the same of the source
with the LoRA; the score is the share of the held-out gap between no LoRA and that oracle.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from calibrate import check_expected
from contenders import CHOSEN, METHODS, STRENGTHS, Case, Updates, judge_bases, scale_updates
from evidence import ROOT, fill_page, results_of
from flow import guided_velocity, predict
from jobs import Job, run_jobs
from lessons import Loss
from models import BASE_SEED, Folder, load_lora, save_lora
from probing import Case as ProbedCase
from probing import run_probe
from results import Row, Table, git, recovered, round_numbers
from safetensors.torch import load_file, save_file
from scoring import STUDENT_STEPS, apply_updates, sample_scores
from study import judge_job, load_judge
from tables import format_cell, format_table
from torch import Tensor, nn
from training import train_lora
from worlds import NAMES, World, backbone, load_world

RESULTS, PAGE = ROOT / "bench/results/students.json", ROOT / "docs/evidence.md"
TERRAIN = ROOT / "bench/results/terrain.json"
STUDENT, ARCH, SEED = "student", "flux", 0
WAYS = ("endpoint", "consistency", "matching")
LENGTHS = (500, 2000, 8000, 32000)
ADAPTERS = {"digits": ("thick", "slanted", "concept"), "icons": ("neon", "duotone", "concept")}
PLAIN = "plain"
"""In place of an adapter: the source without one."""
SHOWN = ("copy @ 1", "auto", "prolora")
BATCH, RATE, WARMUP, AVERAGED, REGRESSION = 16, 5e-4, 50, 0.995, 0.25
PATHS, ORACLE_PATHS, JUDGED = 4096, 512, 160


def student_world(name: str) -> World:
    """The world with a kind of target for students; they are sampled in few steps, unguided."""
    world = load_world(name)
    ranks = dict(world.ranks) | {PLAIN: max(world.ranks[a] for a in ADAPTERS[name])}
    distilled = dict(world.distilled) | {STUDENT: "lines"}
    return replace(world, distilled=distilled, ranks=ranks, judged_rows=JUDGED)


@dataclass
class Paths:
    """States of a sampler from noise to image; from each, a student is asked where it ends.

    Attributes:
        world: of the images.
        states: (n, steps + 1, *shape), at times from 1 to 0.
        y: prompts (n,).
        without: (n, *shape) ends without the LoRA, from the same noise; of held-out paths only.
    """

    world: World
    states: Tensor
    y: Tensor
    without: Tensor | None = None

    def at(self, rows: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        """States and times of these rows after i steps."""
        return self.states[rows, i], 1 - i / (self.states.shape[1] - 1)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows, and steps before the last."""
        rows = torch.randint(len(self.states), (n,), generator=generator)
        return rows, torch.randint(self.states.shape[1] - 1, (n,), generator=generator)

    def loss(self, model: nn.Module) -> Loss:
        """See Lesson."""
        return lambda generator: self._error(model, *self.draw(BATCH, generator))

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> float:
        """See Lesson: every path once, at its own state."""
        rows = torch.arange(len(self.states))
        return self._error(model, rows, rows % (self.states.shape[1] - 1)).item()

    def _error(self, model: nn.Module, rows: Tensor, i: Tensor) -> Tensor:
        """Squared error of the velocity to the end."""
        (x, t), end = self.at(rows, i), self.states[rows, -1]
        output = predict(model, x, t, self.world.tokens(model, self.y[rows]))
        return F.mse_loss(output, (x - end) / wide(t))


def wide(t: Tensor) -> Tensor:
    """(n,) times beside images."""
    return t[:, None, None, None]


@torch.no_grad()
def walk(world: World, model: nn.Module, y: Tensor, seed: int) -> Tensor:
    """States (n, teacher_steps + 1, *shape) of guided sampling, from the noise of `flow.sample`."""
    steps, paths = world.teacher_steps, []
    noise = torch.randn(len(y), *world.shape, generator=torch.Generator().manual_seed(seed))
    for x, prompts in zip(noise.split(64), y.split(64), strict=True):
        tokens, null = (world.tokens(model, p) for p in (prompts, world.null_like(prompts)))
        path = [x]
        for i in range(steps):
            t = torch.full((len(x),), 1 - i / steps)
            v = guided_velocity(model, path[-1], t, tokens, null, world.guidance)
            path.append(path[-1] - v / steps)
        paths.append(torch.stack(path, 1))
    return torch.cat(paths)


def make_paths(folder: Folder, adapter: str, split: str, out: Path) -> None:
    """Writes the paths of the source with an adapter."""
    world, source = folder.world, folder.load_model("source", BASE_SEED)
    n, seed = (world.judged_rows, 99) if split == "held_out" else (PATHS, 7000 + SEED)
    if split == "train" and adapter != PLAIN:
        n, seed = min(n, ORACLE_PATHS), 4000 + SEED
    y = world.draw_prompts(n, torch.Generator().manual_seed(seed), adapter == "concept")
    lora = {} if adapter == PLAIN else load_lora(folder.lora_path("source", SEED, adapter))
    with apply_updates(source, lora):
        parts = {"states": walk(world, source, y, seed), "y": y}
    if split == "held_out" and adapter != PLAIN:
        parts["without"] = walk(world, source, y, seed)[:, -1].contiguous()
    save_file(parts, out)


@dataclass
class Teaching:
    """What a student learns from.

    Attributes:
        world: of the images.
        source: the teacher.
        paths: of the teacher.
        student: is trained.
        fake: knows what the student draws, trained beside it; it starts as the source.
    """

    world: World
    source: nn.Module
    paths: Paths
    student: nn.Module
    fake: nn.Module

    def loss(self, way: str, generator: torch.Generator) -> Tensor:
        """Of a fresh batch, by one of WAYS."""
        rows, i = self.paths.draw(BATCH, generator)
        (x, t), end = self.paths.at(rows, i), self.paths.states[rows, -1]
        tokens = self.world.tokens(self.student, self.paths.y[rows])
        v = predict(self.student, x, t, tokens)
        if way == "consistency":
            # What the student itself makes of the next state; the last state is the end.
            after, left = self.paths.at(rows, i + 1)
            with torch.no_grad():
                end = after - wide(left) * predict(self.student, after, left, tokens)
        learnt = F.mse_loss(v, (x - end) / wide(t))
        if way != "matching":
            return learnt
        matched = self._match(x - wide(t) * v, rows, generator)
        return REGRESSION * learnt + matched

    def _match(self, image: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Distribution matching as in DMD (2311.18828), and what the fake learns meanwhile."""
        y = self.paths.y[rows]
        s = wide(0.02 + 0.96 * torch.rand(len(image), generator=generator))
        noise = torch.randn(image.shape, generator=generator)
        drawn = image.detach()
        x, t = (1 - s) * drawn + s * noise, s.flatten()
        tokens, null = (self.world.tokens(self.source, p) for p in (y, self.world.null_like(y)))
        fake = predict(self.fake, x, t, self.world.tokens(self.fake, y))
        with torch.no_grad():
            real = guided_velocity(self.source, x, t, tokens, null, self.world.guidance)
            size = (drawn - (x - s * real)).abs().mean((1, 2, 3), keepdim=True)
            wanted = drawn - s * (real - fake) / size.clamp_min(1e-3)
        return F.mse_loss(image, wanted) / 2 + F.mse_loss(fake, noise - drawn)


def distil(folder: Folder, way: str, before: Path | None, length: int, out: Path) -> None:
    """Goes on from the state at an earlier length, if any, and writes the one at this length."""
    world = folder.world
    source, student, fake = (folder.load_model("source", BASE_SEED) for _ in range(3))
    trained = [name for name, _ in backbone(source).named_parameters()]
    learners = [student, fake] if way == "matching" else [student]
    parameters = [backbone(m).get_parameter(name) for m in learners for name in trained]
    optimiser = torch.optim.AdamW(parameters, RATE, weight_decay=0.0, fused=True)
    average, done = {n: w.detach().clone() for n, w in student.named_parameters()}, 0
    if before is not None:
        state = torch.load(before, weights_only=True)
        average, done = state["average"], state["done"]
        student.load_state_dict(state["student"])
        fake.load_state_dict(state["fake"])
        optimiser.load_state_dict(state["optimiser"])
    for parameter in parameters:
        parameter.requires_grad_(True)
    paths = load_paths(folder, PLAIN, "train")
    teaching = Teaching(world, source, paths, student.train(), fake.train())
    generator = torch.Generator().manual_seed(5000 + done)
    weights = [weight.detach() for weight in student.parameters()]
    averages = list(average.values())
    for step in range(done, length):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP)
        loss = teaching.loss(way, generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        keep = min(AVERAGED, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, weights, 1 - keep)
    state = {"average": average, "student": student.state_dict(), "fake": fake.state_dict()}
    torch.save(state | {"optimiser": optimiser.state_dict(), "done": length}, out)


def place(folder: Folder, name: str) -> Path:
    """A file of this study."""
    return folder.root / "students" / name


def load_paths(folder: Folder, adapter: str, split: str) -> Paths:
    return Paths(folder.world, **load_file(place(folder, f"paths-{adapter}-{split}.safetensors")))


def load_student(folder: Folder, student: str) -> nn.Module:
    """The averaged weights."""
    model = folder.load_model("source", BASE_SEED)
    state = torch.load(place(folder, f"{student}.pt"), weights_only=True)
    model.load_state_dict(model.state_dict() | state["average"])
    return model.eval().requires_grad_(False)


def make_oracle(folder: Folder, student: str, adapter: str, out: Path) -> None:
    """Trains an adapter on a student; a plain one learns nothing new."""
    lesson, model = load_paths(folder, adapter, "train"), load_student(folder, student)
    save_lora(train_lora(folder.world, ARCH, adapter, SEED, model, lesson), out)


def score(folder: Folder, student: str, adapter: str, out: Path) -> None:
    """Losses and samples of a student with the source's adapter, moved, and with its own."""
    world, lesson = folder.world, load_paths(folder, adapter, "held_out")
    source, target = folder.load_model("source", BASE_SEED), load_student(folder, student)
    lora = load_lora(folder.lora_path("source", SEED, adapter))
    case = Case.of(world, ARCH, STUDENT, source, target, lora)
    moved = {f"copy @ {s:g}": scale_updates(case.updates, s) for s in STRENGTHS}
    moved |= {"auto": CHOSEN["auto"](case), "prolora": METHODS["prolora 0.9"](case)}
    oracle = load_lora(place(folder, f"{student}-{adapter}.safetensors"))
    known: dict[str, Updates] = {"none": {}, "oracle": oracle, **moved}
    losses, ends = {}, {}
    for label, updates in known.items():
        with apply_updates(target, updates):
            losses[label] = lesson.held_out(target)
            if label in ("none", "oracle", *SHOWN):
                ends[label] = world.sample(target, lesson.y, STUDENT_STEPS, 1.0, 99)
    wanted = lesson.states[:, -1] - lesson.without
    follows = {label: follow(drawn - ends["none"], wanted) for label, drawn in ends.items()}
    judge, verdict = load_judge(world, folder.root), judge_bases(case)
    shown = {label: moved[label] for label in SHOWN}
    samples = sample_scores(world, judge, STUDENT, target, adapter, shown, oracle)
    seen = judge(lesson.states[:, -1])[1].argmax(1) == world.content(lesson.y)
    none, best = losses.pop("none"), losses.pop("oracle")
    row = {"none": none, "oracle": best, "losses": losses, "follows": follows, "samples": samples}
    row |= {"teacher seen": float(seen.float().mean()), "repaired": repair(folder, student)}
    facts = {name: getattr(verdict, name) for name in ("drift", "cosine", "spread", "related")}
    out.write_text(json.dumps(round_numbers(row | {"verdict": facts})))


def follow(change: Tensor, wanted: Tensor) -> float:
    """1 where samples change from noise to noise as the source's do, 0 where nothing changes."""
    return 1 - float((change - wanted).square().sum() / wanted.square().sum())


def repair(folder: Folder, student: str) -> float | None:
    """By how much a LoRA that is taught nothing new lowers the loss of the plain student."""
    path = place(folder, f"{student}-{PLAIN}.safetensors")
    if not path.exists():
        return None
    lesson, model = load_paths(folder, PLAIN, "held_out"), load_student(folder, student)
    none = lesson.held_out(model)
    with apply_updates(model, load_lora(path)):
        return none - lesson.held_out(model)


@dataclass
class StudentCase(ProbedCase):
    """One LoRA and a student, for a fit.

    Attributes:
        student: its name.
    """

    student: str = ""

    def __post_init__(self) -> None:
        """As of the study's own targets."""
        folder = Folder(self.world, self.root, self.arch)
        self.source = folder.load_model("source", BASE_SEED)
        self.target = load_student(folder, self.student)
        self.lora = load_lora(folder.lora_path("source", SEED, self.adapter))
        self.oracle = load_lora(place(folder, f"{self.student}-{self.adapter}.safetensors"))
        self.lesson = load_paths(folder, self.adapter, "held_out")
        self.none, self.best = self.loss({}), self.loss(self.oracle)

    def drawn(self, fitted: Updates) -> dict[str, Any]:
        """How samples of the fit change, beside those of the source."""
        ends = []
        for updates in ({}, fitted):
            with apply_updates(self.target, updates):
                ends.append(self.world.sample(self.target, self.lesson.y, STUDENT_STEPS, 1.0, 99))
        wanted = self.lesson.states[:, -1] - self.lesson.without
        return {"follows": follow(ends[1] - ends[0], wanted)}


def fit(folder: Folder, student: str, adapter: str, out: Path, **options: Any) -> None:
    """A fit with the library's usual settings, unless options of `run_probe` are given."""
    where = (folder.world, folder.root, ARCH, ARCH, STUDENT, SEED, adapter)
    row = run_probe(StudentCase(*where, student=student), **options)
    del row["history"], row["seconds"]
    out.write_text(json.dumps(round_numbers(row)))


def make_jobs(
    folder: Folder, ways: list[str], lengths: list[int], adapters: list[str], fitted: list[str]
) -> Iterator[Job]:
    """Everything in the order in which it is wanted: the shortest students first."""
    source = folder.model_path("source", BASE_SEED)
    own = {a: folder.lora_path("source", SEED, a) for a in adapters}
    paths = []
    for adapter in (PLAIN, *adapters):
        for split in ("train", "held_out"):
            out = place(folder, f"paths-{adapter}-{split}.safetensors")
            needs = (source, *([own[adapter]] if adapter != PLAIN else []))
            yield Job(out, needs, functools.partial(make_paths, folder, adapter, split))
            paths.append(out)
    judge = judge_job(folder.world, folder.root)
    yield judge
    before: dict[str, Path | None] = dict.fromkeys(ways)
    for length in lengths:
        for way in ways:
            student = f"{way}-{length}"
            out, last = place(folder, f"{student}.pt"), before[way]
            needs = (source, *paths, *([last] if last else []))
            yield Job(out, needs, functools.partial(distil, folder, way, last, length))
            before[way] = out
            oracles = []
            # What a LoRA repairs is most where a student has learnt least.
            for adapter in (*adapters, *([PLAIN] if length == min(lengths) else [])):
                oracle = place(folder, f"{student}-{adapter}.safetensors")
                run = functools.partial(make_oracle, folder, student, adapter)
                yield Job(oracle, (out, *paths), run)
                oracles.append(oracle)
            for adapter in adapters:
                run = functools.partial(score, folder, student, adapter)
                needs = (*oracles, judge.path)
                yield Job(place(folder, f"{student}-{adapter}.json"), needs, run)
            for adapter in adapters if student in fitted else ():
                run = functools.partial(fit, folder, student, adapter)
                yield Job(place(folder, f"{student}-{adapter}-fit.json"), tuple(oracles), run)


def collect(folder: Folder, kept: dict[str, Any], command: str = "") -> dict[str, Any]:
    """A row for each student and adapter, the kept ones where they were not scored again."""
    rows = {(row["world"], row["kind"], row["adapter"]): row for row in kept.get("rows", [])}
    for path in sorted(place(folder, "").glob("*-*-*.json")):
        way, length, adapter, *fitted = path.stem.split("-")
        names = {"world": folder.world.name, "kind": f"{way}-{length}", "adapter": adapter}
        names |= {"way": way, "length": int(length), "arch": ARCH, "seed": SEED}
        key, part = (names["world"], names["kind"], adapter), json.loads(path.read_text())
        rows[key] = rows.get(key, {}) | names | ({"fit": part} if fitted else part)
    made = {"script": "bench/quality/students.py", "commit": git("rev-parse", "--short", "HEAD")}
    made |= {"torch": torch.__version__, "batch": BATCH, "rate": RATE, "steps": STUDENT_STEPS}
    made["commands"] = [*kept.get("made", {}).get("commands", []), command]
    return {"made": made, "rows": list(rows.values())}


def terrain_rows() -> list[Row]:
    """The child of 25,000 steps that somebody else made, in the form of the students' rows."""
    rows = []
    for row in json.loads(TERRAIN.read_text())["rows"]:
        if (row["direction"], row["adapter"]) == ("forward", "lora-16"):
            names = {"way": "endpoint, not ours", "length": 25000, "arch": "terrain"}
            names |= {"kind": "0.4.2", "seed": row["seed"], "adapter": row["idea"]}
            names |= {part: row["losses"][part] for part in ("none", "oracle")}
            losses = row["losses"] | {"prolora": row["losses"]["prolora 0.9"]}
            fit = {"score": row["shares"]["fit"]} if "fit" in row["shares"] else None
            rows.append(names | {"losses": losses, "verdict": row["verdict"], "fit": fit})
    return [row for row in rows if recovered(row, "copy @ 1") is not None]


@functools.cache
def sizes_in(world: str) -> dict[str, float]:
    """Adapter -> ‖ΔW‖/‖W‖ of the study's LoRA."""
    return json.loads(results_of(world).read_text())["sizes"]


def facts_of(row: Row) -> dict[str, Any]:
    """The numbers of a row's verdict, with the size of the LoRA, which our own rows lack."""
    size = sizes_in(row["world"]).get(row["adapter"]) if "world" in row else None
    return {"size": size} | row["verdict"]


def shares_table(table: Table) -> str:
    """A line for each student: how far it went, what it draws, what is recovered."""
    lines = []
    for way, length in sorted({(row["way"], row["length"]) for row in table.rows}):
        part = table.where(way=way, length=length)
        # Nobody is asked for a digit with the concept.
        first = max(part.rows, key=lambda row: row.get("teacher seen", 0))
        best = part.best_copy()
        line = [way, f"{length:,}", f"{first['verdict']['drift']:.3f}"]
        if drawn := first.get("samples"):
            line.append(f"{drawn['none']['digit']:.2f} / {first['teacher seen']:.2f}")
        else:
            line.append("–")
        cells = [part.share("copy @ 1"), part.share(best)]
        cells += [part.share("prolora"), part.mean(lambda row: (row.get("fit") or {}).get("score"))]
        for label in ("copy @ 1", "oracle"):
            cells.append(part.mean(lambda row, label=label: row.get("follows", {}).get(label)))
        line += [format_cell(cell) for cell in cells]
        rows = [(recovered(row, "copy @ 1"), facts_of(row)) for row in part.rows]
        line[5:5] = check_expected(rows, few_steps=True)
        line[7] += f" at {best.removeprefix('copy @ ')}"
        lines.append(line)
    head = ["taught by", "steps", "drift", "digit seen: student / source", "copy"]
    head += ["expected", "inside", "best fixed copy", "`prolora`", "fit"]
    head += ["samples follow: copy", "trained there"]
    return format_table(head, lines)


def stored_tables() -> dict[str, str]:
    """The page's tables, by their marks."""
    rows = json.loads(RESULTS.read_text())["rows"]
    return {"students": shares_table(Table(rows + terrain_rows()))}


def main() -> None:
    """Distils and scores what is asked for; without --work only fills the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=NAMES, default=NAMES[0])
    parser.add_argument("--work", type=Path, help="folder of study.py")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--adapters", nargs="+", help="all of the world's unless given")
    parser.add_argument("--fitted", nargs="+", default=[], help="students, as consistency-2000")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.work:
        folder = Folder(student_world(asked.world), asked.work, ARCH)
        adapters = asked.adapters or list(ADAPTERS[asked.world])
        run_jobs(list(make_jobs(folder, asked.ways, asked.lengths, adapters, asked.fitted)))
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        command = " ".join("DIR" if word == str(asked.work) else word for word in sys.argv[1:])
        RESULTS.write_text(json.dumps(collect(folder, kept, command), indent=0) + "\n")
    PAGE.write_text(fill_page(PAGE.read_text(), stored_tables()))


if __name__ == "__main__":
    main()
