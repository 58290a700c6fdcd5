"""Moves LoRAs between latent spaces: ``python bench/quality/crossed.py --work DIR``. It resumes.

First it trains what crossing.py describes, then it moves every LoRA with the library's recorder,
fit and gate. Every transfer leaves one JSON file in DIR/crossed; crossing_tables.py makes the
tables of docs/results.md of them. The score is the share of the held-out loss between no LoRA
and the oracle (a LoRA trained on the target's own images) that is recovered; drawn.py scores
samples.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from contenders import Updates
from crossing import ADAPTERS, Crossing, Denoising, Setting, sample
from drawn import score_drawn
from jobs import Job, run_jobs
from latents import Codec, train_codec
from safetensors.torch import load_file, save_file
from scoring import apply_updates
from study import judge_job, load_judge
from torch import Tensor, nn
from training import train_lora
from worlds import load_world

from prolora import LowRank
from prolora.adapters.adapter import Adapter
from prolora.probe import Samplers, Translation
from prolora.probe.pipelines.conditioning import CallParts, PromptTable
from prolora.probe.pipelines.conversion import (
    clip_state,
    common_levels,
    convert_prediction,
    translate_state,
    translate_time,
)
from prolora.probe.pipelines.crossing import CrossingSide
from prolora.probe.pipelines.crossing_recorder import CrossingRecorder
from prolora.probe.pipelines.latents import LatentSpace, SharedLatents
from prolora.probe.pipelines.layouts import LatentLayout
from prolora.probe.pipelines.schedules import NoiseSchedule
from prolora.probe.recording.trajectories import Call
from prolora.probe.report import ProbeReport
from prolora.probe.run import ProbeTransfer, fit_from_recorder, fit_to_models
from prolora.probe.settings import FitSettings

PIXELS = Setting("flux", "pixels", "flow")
COARSE = Setting("flux", "coarse", "flow")
NOISE = Setting("flux", "pixels", "epsilon")
FINE = Setting("unet", "fine", "epsilon")
STRIPED = Setting("flux", "coarse", "flow", "far ground")
PAIRS = {
    "same architecture, other latent space": (PIXELS, COARSE),
    "flow → ε, the same latent": (PIXELS, NOISE),
    "UNet ε in one latent → transformer flow in another": (FINE, COARSE),
    "other latent space, target of another look": (PIXELS, STRIPED),
}
ONCE = (STRIPED,)
"""Targets of which there is one seed."""
SEEDS = (0, 1, 2)
IMAGES = 48
"""Images of each origin for the fit, and a third of that for the verdict."""
STRONGER = (1.25, 1.5, 2.0)
"""Strengths above 1 at which the result is scored and drawn as well."""
NOTHING = ("zero", "noise")
"""LoRAs without an effect that images show: of zeros, and of random numbers."""


class StoredCodec(nn.Module):
    """A codec as the VAE of a pipeline."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Pixels."""
        return (self.codec.decode(z),)

    def encode(self, x: Tensor) -> tuple[Tensor]:
        """Latents."""
        return (self.codec.encode(x),)


class Painted:
    """What a crossing needs of a pipeline: the model, and its name."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.denoiser, self.name = model, name


class BatchedRecorder(CrossingRecorder):
    """Samples all images at once: a pipeline would take one after the other."""

    def _sample(self, side: CrossingSide, seed: int, origin: str) -> dict[str, Tensor]:
        numbers = [int(p) for p in side.settings.prompts]
        images = side.settings.images
        y = torch.tensor([numbers[(seed + i) % len(numbers)] for i in range(images)])
        setting, model = side.pipeline.name, side.pipeline.denoiser
        steps = side.settings.steps
        latents = sample(load_world("icons"), setting, model, y, seed, steps)
        last = 1000.0 if setting.kind == "flow" else 999.0
        times = torch.linspace(last, 0, steps + 1)[:-1]
        noises = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        levels = side.schedule.level_at(times)
        return {"latents": latents, "noises": noises, "levels": levels}


class Move:
    """One LoRA, from one setting to another."""

    def __init__(
        self, study: Crossing, pair: tuple[Setting, Setting], seed: int, adapter: str
    ) -> None:
        """Loads the models, and scores nothing and the oracle."""
        self.study, self.seed, self.adapter = study, seed, adapter
        self.ours, self.theirs = pair
        self.source = study.load_base(self.ours, 0)
        self.target = study.load_base(self.theirs, seed)
        about = "neon" if adapter in NOTHING else adapter
        self.lora = study.load_lora(self.ours, 0, seed, about)
        if adapter in NOTHING:
            self.lora = _without_effect(self.lora, adapter, seed)
        self.lesson = study.lesson(self.theirs, about, "held_out")
        self.none = self.loss({})
        self.best = self.loss(study.load_lora(self.theirs, seed, seed, about))

    def loss(self, updates: Updates) -> float:
        """Held-out loss of the target with updates, names as in diffusers."""
        with apply_updates(self.target, updates):
            return self.lesson.held_out(self.target)

    def score(self, updates: Updates) -> float:
        """Share of the gap that is recovered."""
        return (self.none - self.loss(updates)) / (self.none - self.best)

    def drawn(self, rows: dict[str, Updates]) -> dict[str, dict[str, float]]:
        """What samples say of rows, beside the target alone, the oracle and the source's LoRA."""
        world, root = self.study.world, self.study.root
        oracle = self.study.load_lora(self.theirs, self.seed, self.seed, self.adapter)
        updates = {"none": {}, "oracle": oracle, **rows, "source": self.lora}

        def draw(row: str, y: Tensor, seed: int) -> Tensor:
            ours = row == "source"
            model, setting = (self.source, self.ours) if ours else (self.target, self.theirs)
            with apply_updates(model, updates[row]), torch.no_grad():
                latents = sample(world, setting, model, y, seed)
                codec = self.study.codec(setting.space)
                return latents if codec is None else codec.decode(latents)

        return score_drawn(world, load_judge(world, root), self.adapter, draw, tuple(updates))

    def recorder(self, images: int) -> BatchedRecorder:
        """Of both models: the prompts are those that a user of the LoRA would give."""
        generator = torch.Generator().manual_seed(self.seed)
        about = self.adapter == "concept"
        y = self.study.world.draw_prompts(2 * images, generator, about)
        settings = FitSettings(tuple(str(int(k)) for k in y), images=images)
        sides = [
            self.side(setting, model, settings)
            for setting, model in ((self.ours, self.source), (self.theirs, self.target))
        ]
        updates = {f"backbone.{name}": update for name, update in self.lora.items()}
        return BatchedRecorder(*sides, Adapter(updates, format="diffusers"))

    def side(self, setting: Setting, model: nn.Module, settings: FitSettings) -> CrossingSide:
        """A model as one side of a crossing."""
        world, codec = self.study.world, self.study.codec(setting.space)
        channels = setting.shape[0]
        space = SharedLatents(LatentLayout("image"))
        if self.ours.space != self.theirs.space:
            space = LatentSpace(None)
        if codec is not None:
            known = {"scale": torch.ones(channels), "shift": torch.zeros(channels)}
            space = LatentSpace(StoredCodec(codec), **known)
        y = torch.tensor([*(int(p) for p in settings.prompts), world.null_prompt])
        tokens = world.tokens(model, y)
        entries = [{("tokens",): row[None]} for row in tokens]
        like = CallParts(torch.zeros(25, *setting.shape), torch.zeros(25), entries[0])
        table = PromptTable(model, entries, like)
        return CrossingSide(
            Painted(model, setting), settings, setting.schedule, table, space, (24, 24)
        )


def _without_effect(lora: Updates, kind: str, seed: int) -> Updates:
    """The LoRA with zeros, or with random numbers of the same norm, in place of its updates."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, update in lora.items():
        up = torch.randn(update.up.shape, generator=generator)
        down = torch.randn(update.down.shape, generator=generator)
        scale = 0.0 if kind == "zero" else float(update.dense().norm() / (up @ down).norm())
        made[name] = LowRank(scale * up, down)
    return made


def move_lora(case: Move, images: int) -> tuple[Updates, ProbeReport]:
    """The LoRA of the target, names as in diffusers, at the strength that was chosen."""
    rank = max(32, *(update.rank for update in case.lora.values()))
    settings = FitSettings(rank=rank, seed=100 * case.seed, force=True)
    result = fit_from_recorder(case.recorder(images), {}, settings)
    updates = {n.removeprefix("backbone."): u for n, u in result.adapter.updates.items()}
    return updates, result.report


def record_move(move_of: tuple[Any, ...], images: int) -> dict[str, Any]:
    """The same between models with one latent, by the calls of the samplings alone."""
    case = Move(*move_of)
    rank = max(32, *(update.rank for update in case.lora.values()))
    result = _fit_same_latents(case, images, FitSettings(rank=rank, seed=100 * case.seed))
    updates = {n.removeprefix("backbone."): u for n, u in result.adapter.updates.items()}
    return {"score": case.score(updates)}


def move(move_of: tuple[Any, ...], images: int) -> dict[str, Any]:
    """One transfer by the library and what it is worth."""
    case = Move(*move_of)
    started = time.process_time()
    updates, report = move_lora(case, images)
    verdict = report.gate
    assert verdict is not None
    unweakened = {n: LowRank(u.up / verdict.strength, u.down) for n, u in updates.items()}
    processor = time.process_time() - started
    rows = {"moved": unweakened} | ({"weakened": updates} if verdict.strength < 1 else {})
    stronger = {
        f"{strength:g}": {n: LowRank(strength * u.up, u.down) for n, u in unweakened.items()}
        for strength in STRONGER
    }
    return {
        "none": case.none,
        "oracle": case.best,
        "score": case.score(updates),
        "score_at_1": case.score(unweakened),
        "decision": verdict.decision,
        "strength": verdict.strength,
        "share": verdict.share,
        "disagreement": verdict.disagreement,
        "effect": asdict(verdict.effect) if verdict.effect else None,
        "seconds": report.seconds,
        "crossed": asdict(report.crossed) if report.crossed else None,
        "processor": processor,
        "stronger": {name: case.score(made) for name, made in stronger.items()},
        "drawn": None if case.adapter in NOTHING else case.drawn(rows | stronger),
    }


def _fit_same_latents(case: Move, images: int, settings: FitSettings) -> ProbeTransfer:
    """By recorded calls, translated at equal log-SNR as between pipelines with one VAE."""
    world, ours, theirs = case.study.world, case.ours.schedule, case.theirs.schedule
    prompts = torch.tensor([int(p) for p in case.recorder(images).ours.settings.prompts])

    def sampler(setting: Setting, model: nn.Module) -> Any:
        def run(seed: int) -> None:
            y = prompts[(seed + torch.arange(images)) % len(prompts)]
            sample(world, setting, model, y, seed)

        return run

    def translate_between(a: NoiseSchedule, b: NoiseSchedule) -> Any:
        def translate(call: Call) -> Call:
            x, time, tokens = call.args
            there = translate_time(a, b, time).float()
            return Call((translate_state(a, b, x, time), there, tokens), {})

        return translate

    def clip(call: Call) -> Call:
        schedule = theirs if call.origin == "target" else ours
        bounds = common_levels(ours, theirs)
        assert bounds is not None
        x, time = clip_state(schedule, bounds, *call.args[:2])
        return Call((x, time.float(), call.args[2]), {})

    return fit_to_models(
        case.source,
        case.target,
        Adapter({f"backbone.{n}": u for n, u in case.lora.items()}, format="diffusers"),
        Samplers(sampler(case.ours, case.source), sampler(case.theirs, case.target)),
        replace(settings, force=True),
        translation=Translation(
            translate_between(ours, theirs),
            translate_between(theirs, ours),
            lambda call, f: convert_prediction(ours, theirs, *call.args[:2], f),
            clip=clip,
        ),
        rival={},
    )


def train_ceiling(move_of: tuple[Any, ...], images: int) -> dict[str, Any]:
    """A LoRA trained on the target on the same images, as many steps as the oracle."""
    case = Move(*move_of)
    recorder = case.recorder(images)
    settings = recorder.ours.settings
    y = torch.tensor([int(p) for p in settings.prompts[:images]])
    numbers = torch.arange(images)
    prompts = torch.tensor([int(p) for p in settings.prompts])
    started = time.process_time()
    crossed = {}
    for i, lora in enumerate(({}, case.lora)):
        y = prompts[(100 * case.seed + i + numbers) % len(prompts)]
        with apply_updates(case.source, lora):
            z = sample(case.study.world, case.ours, case.source, y, 100 * case.seed + i, 25)
        pixels = recorder.ours.space.decode(z)
        crossed[i] = recorder.theirs.space.encode(pixels), y
    kept = crossed[0] if case.adapter == "concept" else None
    lesson = Denoising(case.study.world, case.theirs.schedule, crossed[1], kept)
    arch = case.theirs.arch
    updates = train_lora(case.study.world, arch, case.adapter, case.seed, case.target, lesson)
    return {"score": case.score(updates), "processor": time.process_time() - started}


def write(make: Any, names: dict[str, Any], move_of: tuple[Any, ...], out: Path) -> None:
    """One row of the study, as a file."""
    out.write_text(json.dumps(names | make(move_of, names["images"])))


def training_jobs(study: Crossing) -> list[Job]:
    """Codecs, bases and adapters, each once."""
    judge = judge_job(study.world, study.root)
    jobs: dict[Path, Job] = {judge.path: judge}
    words = study.root / "words.safetensors"
    codecs = []
    for space in ("fine", "coarse"):
        path = study.root / f"{space}.safetensors"
        codecs.append(path)
        run = functools.partial(_make_codec, study, space)
        jobs[path] = Job(path, (), run)

    def add(setting: Setting, base: int, seed: int) -> None:
        path = study.base_path(setting, base)
        run = functools.partial(study.make_base, setting, base)
        jobs.setdefault(path, Job(path, (words, *codecs), run))
        for adapter in ADAPTERS:
            lora = study.lora_path(setting, base, seed, adapter)
            train = functools.partial(study.make_lora, setting, base, seed, adapter)
            jobs.setdefault(lora, Job(lora, (path,), train))

    for seed in SEEDS:
        for source, target in PAIRS.values():
            if seed == 0 or target not in ONCE:
                add(source, 0, seed)
                add(target, seed, seed)
    return list(jobs.values())


def _make_codec(study: Crossing, space: str, out: Path) -> None:
    save_file(train_codec(study.world, space).state_dict(), out)


def take_source(study: Crossing, icons: Path) -> None:
    """The study's source of pixels, and its text encoder, from the folder of study.py."""
    stored = load_file(icons / "flux/source-0.safetensors")
    save_file(stored, study.base_path(PIXELS, 0))
    words = {
        k.removeprefix("text_encoder."): v
        for k, v in stored.items()
        if k.startswith("text_encoder.")
    }
    save_file(words, study.root / "words.safetensors")


def scoring_jobs(study: Crossing, images: int) -> list[Job]:
    """Every LoRA moved, and its ceiling."""
    jobs = []
    for seed in SEEDS:
        for name, pair in PAIRS.items():
            if seed and pair[1] in ONCE:
                continue
            for adapter in (*ADAPTERS, *(NOTHING if seed == 0 and pair[1] not in ONCE else ())):
                about = "neon" if adapter in NOTHING else adapter
                needs = (
                    study.root / "judge.safetensors",
                    study.base_path(pair[0], 0),
                    study.base_path(pair[1], seed),
                    study.lora_path(pair[0], 0, seed, about),
                    study.lora_path(pair[1], seed, seed, about),
                )
                makes = {"probe": move, "trained": train_ceiling}
                if pair[0].space == pair[1].space and seed == 0:
                    makes["recorded"] = record_move
                if adapter in NOTHING:
                    makes = {"probe": move}
                for method, make in makes.items():
                    names = {
                        "pair": name,
                        "seed": seed,
                        "adapter": adapter,
                        "method": method,
                        "images": images,
                    }
                    slug = re.sub(r"\W+", "-", f"{name} {seed} {adapter} {method} {images}")
                    move_of = (study, pair, seed, adapter)
                    run = functools.partial(write, make, names, move_of)
                    jobs.append(Job(study.root / "crossed" / f"{slug}.json", needs, run))
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and scores")
    parser.add_argument("--icons", type=Path, help="folder of study.py, for its source")
    parser.add_argument("--images", type=int, default=IMAGES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = Crossing(load_world("icons"), options.work)
    if options.icons:
        take_source(study, options.icons)
    run_jobs([*scoring_jobs(study, options.images), *training_jobs(study)])


if __name__ == "__main__":
    main()
