"""A short training of a moved LoRA on pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..architectures.modules import is_in_text_encoder
from ..core.lowrank import LowRank
from ..errors import InvalidOption, ProLoRAError, UnrelatedBases
from ..reports.report import Sentence
from ..verbs.result import Transfer
from .default_prompts import DIVERSE
from .finishing import finish_updates, move_by_weights
from .fit_plan import FitJob
from .fit_report import FitReport
from .gate import STRENGTHS, Gain
from .models import frozen, in_precision
from .picture_files import PictureFolder, read_picture, read_pictures
from .pipelines.latents import check_shown
from .pipelines.memory_bounds import check_memory, watch_memory
from .pipelines.pipeline import run_text_encoders_beside
from .pipelines.pipeline_opening import open_pipeline
from .pipelines.pipeline_side import PipelineSide
from .probes import FREE_SHARE, check_sampled
from .settings import DEFAULT_FIT, FitOptions
from .sides import NO_PROMPT, FitSide, Image
from .solver.linearisation import recompute_blocks
from .updates import place_factors, with_lora

START, PACE = 0.6, 0.03
"""Strength of the copy to start from (docs/results.md); a step in units of a fresh A, which is 2e-3
where a layer reads 64 numbers."""
STEPS, EVERY, BATCH, OWN_BATCH, OWN_WEIGHT = 120, 10, 8, 4, 0.3
"""Steps of AdamW at most, and between two looks at held-out pictures; pictures and own samples of a
step, and the weight of the latter."""
HELD_OUT, QUESTIONS = 4, 96
"""One picture in so many is held out; questions about those that are."""
TRAINED, NOTHING = "the training", "no LoRA"
_UNUSED = "look", "max_vram", "rank", "fit_steps", "probes", "held_out", "batch", "resume"

Images = tuple[Tensor, list[int]]
"""Latents [n, ...] in float32, and the number of each one's prompt."""


@dataclass(frozen=True, repr=False, kw_only=True)
class PictureReport(FitReport):
    """What a training on pictures did, and how well."""

    taught: int  # pictures that were learnt
    unseen: int  # pictures that chose the step, and judge
    own: int  # samples of the target that were learnt with them
    start: str  # what the training went on from
    step: int  # whose updates were best on held-out pictures
    # What was tried -> squared error on held-out pictures over that of the target without a LoRA
    errors: dict[str, float]
    gain: Gain  # of the training over the best of the others, in errors without a LoRA
    rival: str  # which of `errors` is best without training
    written: str  # which is written

    def _judge(self) -> Sentence:
        lines = (
            f"prolora trained the LoRA for {self.step} steps on {self.taught} of your pictures.",
            f"On the other {self.unseen} its error is {self.errors[TRAINED]:.2f} of that without a "
            f"LoRA; the best without training, {self.rival}, has {self.errors[self.rival]:.2f}.",
        )
        verdict = Sentence("✔", f"This should work on {self.target}.", lines, (*self.cautions(),))
        step = "Next: try it at strength 1, and less where it is too strong."
        if self.written != TRAINED:
            verdict = replace(
                verdict, mark="⚠", headline="The pictures taught nothing that is sure."
            )
            step = f"So the file holds {self.written}. Next: give more pictures."
        return replace(verdict, lines=(*lines, step))

    def sentences(self) -> list[str]:
        """Writes what was trained, and what held-out pictures show."""
        listed = ", ".join(f"{error:.3f} for {name}" for name, error in self.errors.items())
        return [
            *super().sentences(),
            f"{self.taught} pictures and {self.own} samples of the target were learnt, starting "
            f"from {self.start}; {self.unseen} other pictures chose step {self.step} of {STEPS}.",
            f"On these the squared error is {listed}; the training gains {self.gain.share:.3f}, "
            f"with a standard error of {self.gain.error:.3f}.",
        ]

    def _describe_done(self) -> str:
        return f"trained for {self.target}"


def open_pictures(options: FitOptions) -> PictureFolder:
    """Reads the folder of pictures; refuses options that a training has no use for.

    Raises:
        InvalidOption: such an option, or see `read_pictures`.
        UnsupportedFormat: a picture that cannot be read.
    """
    for name in _UNUSED:
        if getattr(options, name) != getattr(DEFAULT_FIT, name):
            raise InvalidOption(f"`{name}` is of use in a fit of two models, not with `pictures`")
    return read_pictures(Path(options.pictures or ""), options.prompts)


@dataclass(frozen=True)
class Training:
    """The images of a training, and how the target is asked."""

    side: FitSide
    options: FitOptions
    levels: Tensor  # of the target's sampler, falling
    taught: Images  # to be learnt
    unseen: Images  # that choose the step, and judge
    own: Images  # that the target samples without a LoRA, so that it keeps what it draws

    def compare(
        self, start: Mapping[str, LowRank], moved: Mapping[str, LowRank], label: str
    ) -> tuple[dict[str, LowRank], dict[str, Any]]:
        """Trains, and chooses between that, `start` and the copies; returns facts as well.

        A start that is no better than no LoRA gives way to none. The training is chosen where its
        gain is sure, or forced; one held-out picture has no standard error.
        """
        made = {f"the copy at {s:g}": scale_updates(moved, s) for s in STRENGTHS} if moved else {}
        made = {label: dict(start), NOTHING: {}} | made
        errors = {name: self.judge(updates, name != NOTHING) for name, updates in made.items()}
        plain, rival = errors[NOTHING], min(errors, key=lambda name: float(errors[name].sum()))
        if errors[label].sum() >= plain.sum():
            label, start = "nothing", scale_updates(start, 0.0)
        made[TRAINED], step, errors[TRAINED] = self.run(start)
        sums = {name: float(error.sum() / plain.sum()) for name, error in errors.items()}
        count = len(plain)
        better = (errors[rival] - errors[TRAINED]) / plain.mean()
        error = float(better.std()) / math.sqrt(count) if count > 1 else 0.0
        gain = Gain(float(better.mean()), error, count)
        written = TRAINED if gain.lowest > 0 or self.options.force else rival
        if written == NOTHING:
            raise UnrelatedBases(
                f"on {count} held-out pictures no copy is better than no LoRA, and the training by "
                f"{gain.share:.1%} ± {gain.error:.1%} of the error only: give more pictures, or "
                "choose `force`"
            )
        facts: dict[str, Any] = {"taught": len(self.taught[1]), "unseen": count}
        facts |= {"own": len(self.own[1]), "start": label, "step": step, "errors": sums}
        facts |= {"gain": gain, "rival": rival, "written": written}
        return made[written], facts

    @torch.no_grad()
    def judge(self, updates: Mapping[str, LowRank], adapted: bool = True) -> Tensor:
        """Measures every held-out picture's squared error [n], at one set of levels and noises.

        `adapted` says that the LoRA's part in text encoders runs.
        """
        generator, count = torch.Generator().manual_seed(1), len(self.unseen[1])
        rows = [*range(count)] * math.ceil(QUESTIONS / count)
        with with_lora(self.side.denoiser, updates):
            errors = torch.cat([*self._measure(self.unseen, rows, generator, adapted)])
        return errors.double().cpu().unflatten(0, (-1, count)).mean(0)  # type: ignore[no-any-return]

    def run(self, start: Mapping[str, LowRank]) -> tuple[dict[str, LowRank], int, Tensor]:
        """Trains from updates; returns the best on held-out pictures, their step and errors."""
        options, generator = self.options, torch.Generator().manual_seed(self.options.seed)
        factors, groups = dict[str, tuple[Tensor, Tensor]](), list[dict[str, Any]]()
        for name, update in start.items():
            fresh = 1 / math.sqrt(3 * update.down.shape[1])
            scale = fresh / max(float(update.down.float().square().mean().sqrt()), 1e-30)
            pair = (update.up / scale, update.down * scale)  # A as large as a fresh one
            up, down = (part.to(self.side.device, torch.float32).clone() for part in pair)
            factors[name] = up.requires_grad_(), down.requires_grad_()
            groups.append({"params": [*factors[name]], "lr": PACE * fresh})
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        parts = (self.taught, BATCH, 1.0), (self.own, OWN_BATCH, OWN_WEIGHT)
        best, at, least = dict[str, LowRank](), 0, torch.tensor([math.inf])
        with recompute_blocks(self.side.denoiser), place_factors(self.side.denoiser, factors):
            for step in range(STEPS + 1):
                options.report_progress(options.images + step, options.images + STEPS, "training")
                if step % EVERY == 0 and float((seen := self.judge({})).sum()) < float(least.sum()):
                    at, least = step, seen
                    best = {
                        name: LowRank(*(part.detach().cpu().clone() for part in pair))
                        for name, pair in factors.items()
                    }
                optimizer.zero_grad()
                for images, count, weight in parts if step < STEPS else ():
                    rows = torch.randint(len(images[1]), (count,), generator=generator).tolist()
                    with torch.enable_grad():
                        for errors in self._measure(images, rows, generator):
                            torch.autograd.backward(weight / count * errors.sum())
                optimizer.step()
        if not best:
            raise ProLoRAError("the target predicts NaN or Inf for the held-out pictures")
        return best, at, least

    def _measure(
        self, images: Images, rows: list[int], generator: torch.Generator, adapted: bool = True
    ) -> Iterator[Tensor]:
        """Yields squared errors [n] of images under noise, call by call.

        Levels are spread evenly over the sampler's; a tenth is asked without a prompt.
        """
        side, count, steps = self.side, len(rows), self.levels
        drawn = torch.rand(2, count, generator=generator)
        at = (torch.randperm(count, generator=generator) + drawn[0]).double() / count * len(steps)
        step = at.long().clamp_max(len(steps) - 1)
        levels = steps[step].lerp(torch.cat([steps[1:], 0 * steps[:1]])[step], at - step)
        levels = levels.clamp(*side.schedule.levels)
        free = (drawn[1] < FREE_SHARE).tolist()
        asked = [NO_PROMPT if no else images[1][k] for k, no in zip(rows, free, strict=True)]
        for i in range(0, count, side.at_once):
            part = slice(i, i + side.at_once)
            clean, level = images[0][rows[part]], levels[part]
            state = side.mix(clean, torch.randn(clean.shape, generator=generator), level)
            call = side.build_call(state, level, asked[part], adapted)
            prediction = side.read(side.denoiser(*call.args, **call.kwargs))
            wanted = side.predict_clean(state, level, clean).to(prediction)
            yield (prediction - wanted).square().flatten(1).mean(1)


def scale_updates(updates: Mapping[str, LowRank], strength: float) -> dict[str, LowRank]:
    """Returns B·A times a strength, by module."""
    return {name: LowRank(strength * u.up, u.down) for name, u in updates.items()}


@contextmanager
def open_training(job: FitJob, captions: Mapping[Path, str]) -> Iterator[Training]:
    """Opens the target alone, encodes the pictures and samples it; frees its memory at the end."""
    options, folder, text = job.options, job.folders[1], job.lora.carried
    own = options.prompts if {*options.prompts} - {*captions.values()} else DIVERSE
    plan = f"{options.images} samples of the target, {STEPS} steps of {BATCH + OWN_BATCH} images."
    options.report_progress(
        0, options.images + STEPS, f"Training on {len(captions)} pictures: {plan}"
    )
    if options.memory_limit is not None:
        check_memory(options.memory_limit, (folder, folder), options.device)
    model = open_pipeline(folder, options.device)
    try:
        check_shown(model.pipe, model.name)
        prompts = tuple(dict.fromkeys((*captions.values(), *own)))
        settings = model.derive_target_settings(replace(options, prompts=prompts))
        for updates in (text, {}):
            with run_text_encoders_beside(model, updates):
                model.encode_prompts(settings)
        assert model.memory is not None
        model.memory.release()
        side = PipelineSide(model, settings, False, text)
        with frozen(side.denoiser), in_precision(side.denoiser, settings.precision):
            pixels = (read_picture(path, *side.pixels).to(side.device) for path in captions)
            latents = torch.cat([side.space.encode(one).cpu() for one in pixels])
            numbers = torch.tensor([prompts.index(caption) for caption in captions.values()])
            is_unseen = torch.arange(len(latents)) % HELD_OUT == 0
            taught, unseen = (
                (latents[rows], numbers[rows].tolist()) for rows in (~is_unseen, is_unseen)
            )
            asked = [prompts.index(own[i % len(own)]) for i in range(options.images)]
            images, check = list[Image](), watch_memory(options.memory_limit)
            for i, prompt in enumerate(asked):
                options.report_progress(i, len(asked) + STEPS, f"sampling {side.name}")
                images.append(side.sample(options.seed + i, prompt))
                check_sampled(images[-1].latent, "target")
                check((i + 1) / len(asked))
            drawn = side.space.as_image(torch.cat([image.latent.float() for image in images]))
            levels = torch.cat([image.levels for image in images]).double().round(decimals=6)
            kept = side.space.as_latent(drawn).cpu(), asked
            yield Training(side, options, levels.unique().flip(0), taught, unseen, kept)
    finally:
        model.free()


def train_on_pictures(
    job: FitJob, blank: Adapter, fit: Callable[[FitOptions], Transfer]
) -> tuple[Adapter, PictureReport]:
    """Trains from the LoRA as weights move it, or from a fit.

    That is where weights move nothing; without a source the LoRA is copied.
    """
    captions, _ = pictures = open_pictures(job.options)
    moved, label = job.adapter.updates, f"the copy at {START:g}"
    if job.source is not job.target:
        baseline = move_by_weights(job)
        moved = {} if baseline is None or baseline.refusal else baseline.done.adapter.updates
    start = scale_updates(moved, START)
    if not moved:
        asked = replace(job.options, pictures=None, force=True, prompts=tuple(captions.values()))
        label, start = "the fit", fit(asked).adapter.updates
    start, moved = (
        {name: u for name, u in part.items() if not is_in_text_encoder(name)}
        for part in (start, moved)
    )
    with open_training(job, captions) as training:
        updates, facts = training.compare(start, moved, label)
    how = "trained on pictures" if facts["written"] == TRAINED else f"holds {facts['written']}"
    made = {"prolora.pictures": str(len(captions)), "prolora.picture_step": str(facts["step"])}
    adapter, report = finish_updates(job, blank, updates, how, made)
    shared = {one.name: getattr(report, one.name) for one in fields(report)}
    shared["warnings"] += pictures.warnings
    return adapter, PictureReport(**shared | facts)
