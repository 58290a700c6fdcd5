"""Ways for a LoRA to cross latent spaces, compared: ``python crossing_ideas.py --work DIR``.

DIR is the folder of crossed.py. Every way fits as many samples, by the joint fit of the library;
they differ in what the target is asked and what it should answer there. The library does
"answers and pairs" (docs/fit_measured.md says why).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from crossed import PAIRS, Move
from crossing import ADAPTERS, Crossing, clean_of, expand_rows, mix_noise, sample
from jobs import Job, run_jobs
from scoring import apply_updates
from torch import Tensor, nn
from worlds import backbone, load_world

from prolora.probe.fitting.joint_fit import JointProblem, fit_jointly
from prolora.probe.fitting.linearisation import ProbeBatch
from prolora.probe.pipelines.conversion import translate_time
from prolora.probe.recording.trajectories import Call, output_of

SHOWN = ("same architecture, other latent space", "other latent space, target of another look")
IMAGES, SAMPLES, BATCH, STEPS, RANK = 48, 1152, 48, 32, 32
FREE_SHARE = 0.2
PATCHES = 6
"""Places along a side: every latent is folded to so many for the linear map."""
Latents = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Drawn:
    """Images of one origin.

    Attributes:
        ours: their latents of the source.
        theirs: those of the target.
        prompts: of them.
    """

    ours: Tensor
    theirs: Tensor
    prompts: Tensor


def draw_images(case: Move, seed: int) -> dict[str, Drawn]:
    """Images by the source with and without the LoRA from the same noise, and by the target."""
    world, generator = case.study.world, torch.Generator().manual_seed(seed)
    y = world.draw_prompts(IMAGES, generator, case.adapter == "concept")
    recorder = case.recorder(IMAGES)
    ours, theirs = recorder.ours.space, recorder.theirs.space
    drawn = {}
    for origin, lora in (("source", {}), ("adapted", case.lora)):
        with apply_updates(case.source, lora):
            z = sample(world, case.ours, case.source, y, seed)
        drawn[origin] = Drawn(z, theirs.encode(ours.decode(z)), y)
    z = sample(world, case.theirs, case.target, y, seed + 1)
    return drawn | {"target": Drawn(ours.encode(theirs.decode(z)), z, y)}


class LinearMap:
    """A ridge map from the source's latents to the target's, of 3 × 3 places each."""

    def __init__(self, drawn: dict[str, Drawn]) -> None:
        """Fits it to images."""
        ours = torch.cat([part.ours for part in drawn.values()])
        theirs = torch.cat([part.theirs for part in drawn.values()])
        self.shape = theirs.shape[1:]
        x, y = self._neighbours(ours, 3), _patches(theirs).flatten(0, 1)
        self.mean_x, self.mean_y = x.flatten(0, 1).mean(0), y.mean(0)
        centred = x.flatten(0, 1) - self.mean_x
        self.matrix = _ridge(centred, y - self.mean_y)
        self.explained = 1 - float(
            (y - self.mean_y - centred @ self.matrix).square().sum()
            / (y - self.mean_y).square().sum()
        )
        # Noise of the target as noise of the source: the nearest partial isometry.
        single = _patches(ours).flatten(0, 1)
        left, _, right = torch.linalg.svd(
            _ridge(single - single.mean(0), y - self.mean_y), full_matrices=False
        )
        self.isometry = left @ right

    def __call__(self, latent: Tensor) -> Tensor:
        """The target's latents."""
        y = (self._neighbours(latent, 3) - self.mean_x) @ self.matrix + self.mean_y
        return _unfold_places(y, self.shape)

    def couple_noise(self, noise: Tensor, fresh: Tensor) -> Tensor:
        """The source's noise that corresponds to the target's; the rest of it is fresh."""
        ours, theirs = _patches(fresh), _patches(noise)
        if self.isometry.shape[0] < self.isometry.shape[1]:
            return _unfold_places(theirs @ self.isometry.mT, fresh.shape[1:])
        rest = ours - ours @ self.isometry @ self.isometry.mT
        return _unfold_places(rest + theirs @ self.isometry.mT, fresh.shape[1:])

    @staticmethod
    def _neighbours(latent: Tensor, side: int) -> Tensor:
        folded = F.pixel_unshuffle(latent, latent.shape[-1] // PATCHES)
        return F.unfold(folded, side, padding=side // 2).mT


def _patches(latent: Tensor) -> Tensor:
    """[n, c, h, w] -> [n, places, numbers of a place]."""
    return F.pixel_unshuffle(latent, latent.shape[-1] // PATCHES).flatten(2).mT


def _unfold_places(rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_patches`."""
    image = rows.mT.unflatten(2, (PATCHES, PATCHES))
    return F.pixel_shuffle(image, shape[-1] // PATCHES)


def _ridge(x: Tensor, y: Tensor, share: float = 1e-3) -> Tensor:
    x, y = x.double(), y.double()
    gram = x.mT @ x
    damped = gram + share * gram.diagonal().mean() * torch.eye(len(gram)).double()
    return torch.linalg.solve(damped, x.mT @ y).float()


Batches = Iterator[ProbeBatch]


def ask_source(
    case: Move, drawn: dict[str, Drawn], generator: torch.Generator, linear: bool, coupled: bool
) -> Batches:
    """The change of the source's x₀, crossed by pixels or by a linear map.

    Args:
        case: the LoRA and its target.
        drawn: images by origin.
        generator: of what is drawn.
        linear: whether a change crosses by the linear map.
        coupled: whether the source's noise corresponds to the target's by that map.
    """
    ours, theirs = case.ours.schedule, case.theirs.schedule
    spaces = case.recorder(1)
    crossed = LinearMap(drawn)
    parts = list(drawn.values())
    while True:
        origins = torch.randint(len(parts), (BATCH,), generator=generator).tolist()
        rows = torch.randint(IMAGES, (BATCH,), generator=generator).tolist()
        picked = [(parts[o], row) for o, row in zip(origins, rows, strict=True)]
        here = torch.stack([part.ours[row] for part, row in picked])
        there = torch.stack([part.theirs[row] for part, row in picked])
        y = torch.stack([part.prompts[row] for part, row in picked])
        time_there, y = _draw_times(case, y, generator)
        time_here = translate_time(theirs, ours, time_there).float()
        noise = torch.randn(there.shape, generator=generator)
        fresh = torch.randn(here.shape, generator=generator)
        seen = crossed.couple_noise(noise, fresh) if coupled else fresh
        x = mix_noise(ours, here, seen, time_here)
        cleans = []
        for lora in ({}, case.lora):
            with apply_updates(case.source, lora):
                f = _predict(case, case.source, x, time_here, y)
            clean = clean_of(ours, x, time_here, f)
            pixels = spaces.ours.space.decode
            cleans.append(crossed(clean) if linear else spaces.theirs.space.encode(pixels(clean)))
        x = mix_noise(theirs, there, noise, time_there)
        yield _batch(case, x, time_there, y, cleans[1] - cleans[0])


def compare_images(
    case: Move, drawn: dict[str, Drawn], generator: torch.Generator, control: str
) -> Batches:
    """What the target misses of images with the LoRA, less what it misses of those without it.

    Args:
        case: the LoRA and its target.
        drawn: images by origin.
        generator: of what is drawn.
        control: "none", "full", or "slope", which takes off as much as explains the other.
    """
    theirs = case.theirs.schedule
    while True:
        rows = torch.randint(IMAGES, (BATCH,), generator=generator)
        before, after = drawn["source"].theirs[rows], drawn["adapted"].theirs[rows]
        time_there, y = _draw_times(case, drawn["source"].prompts[rows], generator)
        noise = torch.randn(before.shape, generator=generator)
        states = [mix_noise(theirs, z, noise, time_there) for z in (before, after)]
        missed, missing = (
            z - clean_of(theirs, x, time_there, _predict(case, case.target, x, time_there, y))
            for z, x in zip((before, after), states, strict=True)
        )
        slope = {"none": torch.zeros(BATCH), "full": torch.ones(BATCH)}.get(control)
        if slope is None:
            dot, size = ((missed * m).flatten(1).sum(1) for m in (missing, missed))
            slope = (dot / size).clamp(0, 1)
        yield _batch(case, states[1], time_there, y, missing - expand_rows(slope) * missed)


def _draw_times(case: Move, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Times of the target, and the prompts, some of them hidden."""
    share = torch.randperm(len(y), generator=generator) + torch.rand(len(y), generator=generator)
    schedule, last = case.theirs.schedule, 1000.0 if case.theirs.kind == "flow" else 999.0
    bounds = [s.levels for s in (case.ours.schedule, schedule)]
    low, high = max(low for low, _ in bounds), min(high for _, high in bounds)
    level = schedule.level_at(last * share / len(y)).clamp(low, high)
    hidden = torch.rand(len(y), generator=generator) < FREE_SHARE
    return schedule.time_at(level).float(), torch.where(hidden, case.study.world.null_prompt, y)


@torch.no_grad()
def _predict(case: Move, model: nn.Module, x: Tensor, time: Tensor, y: Tensor) -> Tensor:
    return model(x, time, case.study.world.tokens(model, y))[0]


def _batch(case: Move, x: Tensor, time: Tensor, y: Tensor, change: Tensor) -> ProbeBatch:
    """The target should change its x₀ by this."""
    schedule = case.theirs.schedule
    plain = _predict(case, case.target, x, time, y)
    c, _ = schedule.weights(schedule.level_at(time))
    call = Call((x, time, case.study.world.tokens(case.target, y)), {}, "mixed")
    return ProbeBatch(call, plain, plain + expand_rows(c) * change)


def mix(first: Batches, second: Batches) -> Batches:
    """One of each in turn."""
    while True:
        yield next(first)
        yield next(second)


Way = Callable[[Move, dict[str, Drawn], torch.Generator], Batches]
_pixels = functools.partial(ask_source, linear=False, coupled=False)
_pairs = functools.partial(compare_images, control="slope")
WAYS: dict[str, Way] = {
    "answers, by pixels": _pixels,
    "answers, by a linear map": functools.partial(ask_source, linear=True, coupled=False),
    "answers, by pixels, corresponding noise": functools.partial(
        ask_source, linear=False, coupled=True
    ),
    "images with the LoRA alone": functools.partial(compare_images, control="none"),
    "pairs, all of the other's error off": functools.partial(compare_images, control="full"),
    "pairs": _pairs,
    "answers and pairs": lambda *args: mix(_pixels(*args), _pairs(*args)),
}

TRIED_ON_LOOKS = ("answers, by pixels", "images with the LoRA alone", "pairs", "answers and pairs")
"""Ways that are tried on a target of another look."""


def try_way(study: Crossing, pair: str, way: str, seed: int, adapter: str, out: Path) -> None:
    """One LoRA moved in one way, as a file."""
    case = Move(study, PAIRS[pair], seed, adapter)
    drawn = draw_images(case, 100 * seed + 7)
    started = time.process_time()
    batches = WAYS[way](case, drawn, torch.Generator().manual_seed(seed))
    kept = [next(batches) for _ in range(SAMPLES // BATCH)]
    turn = iter(kept * (STEPS // len(kept) + 1))
    names = [
        f"backbone.{name}"
        for name, _ in backbone(case.target).named_modules()
        if re.fullmatch(study.world.adapted[case.theirs.arch], name)
    ]
    problem = JointProblem(case.target, names, output_of, lambda: [next(turn)], STEPS, 1.0, RANK)
    updates = fit_jointly(problem).updates
    score = case.score({name.removeprefix("backbone."): u for name, u in updates.items()})
    row = {"pair": pair, "way": way, "seed": seed, "adapter": adapter, "images": IMAGES}
    row |= {"score": score, "processor": time.process_time() - started}
    if "linear" in way:
        row["explained"] = LinearMap(drawn).explained
    out.write_text(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of crossed.py")
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = Crossing(load_world("icons"), options.work)
    jobs = []
    for pair, adapter, way in itertools.product(SHOWN, ADAPTERS, WAYS):
        if pair != SHOWN[0] and way not in TRIED_ON_LOOKS:
            continue
        slug = re.sub(r"\W+", "-", f"{pair} {way} {adapter}")
        needs = study.lora_path(PAIRS[pair][1], 0, 0, adapter)
        run = functools.partial(try_way, study, pair, way, 0, adapter)
        jobs.append(Job(options.work / "ideas" / f"{slug}.json", (needs,), run))
    run_jobs(jobs)


if __name__ == "__main__":
    main()
