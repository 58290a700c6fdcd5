"""Questions about images: sampled, crossed, and asked of both models at noise levels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ...adapters.adapter import Adapter
from ...core.lowrank import LowRank
from ...errors import ProLoRAError
from ..checkpoint import Checkpoints, hash_texts
from ..recording.recorder import ORIGINS, hash_origins
from ..recording.trajectories import Call, check_sampled
from ..recording.translation import PAIR, Question
from ..updates import run_beside
from .conditioning import stack_conditionings
from .crossing import CrossedTranslation, CrossingSide, cross_clean, draw_noise, takes_few_steps
from .pipeline import run_text_encoders_beside
from .schedules import level_log_snr

_QUESTIONS = 2**30  # seeds of draws for questions, beyond the samplers' seeds
FREE_SHARE = 0.2
"""Share of the samples that are asked without a prompt, as guidance asks them."""


@dataclass(frozen=True)
class DrawnStates:
    """What is drawn for one call."""

    levels: Tensor  # of the noise [n]
    prompts: list[int]  # numbers of the prompts, −1 for none
    generator: torch.Generator  # of the noise


@dataclass(frozen=True)
class CrossingRecorder:
    """Samples images and asks both models about them.

    The images are sampled by the source, the source with its LoRA, and the target. It replaces
    `Recorder` where recorded calls mean nothing to the other model.
    """

    ours: CrossingSide  # the source
    theirs: CrossingSide  # the target
    adapter: Adapter  # the LoRA of the source
    # Where final latents are kept
    checkpoints: Checkpoints = field(default_factory=lambda: Checkpoints(None))
    # Origin -> hash of what its images depend on, besides the seed and the models
    keys: Mapping[str, str] = field(default_factory=lambda: hash_origins({}, ""))
    # Called with the origin of an image after it was sampled
    on_image: Callable[[str], None] | None = None
    # Updates of the source's text encoders that the LoRA is run with
    text: Mapping[str, LowRank] = field(default_factory=dict)

    @property
    def source(self) -> nn.Module:
        """The source model."""
        return self.ours.pipeline.denoiser

    @property
    def target(self) -> nn.Module:
        """The target model."""
        return self.theirs.pipeline.denoiser

    @property
    def crossed(self) -> int:
        """Images that cross for the fit and for the verdict."""
        return 2 * len(ORIGINS) * self.ours.settings.images

    @cached_property
    def translation(self) -> CrossedTranslation:
        """Turns the source's predictions into the target's terms."""
        return CrossedTranslation.of(self.ours, self.theirs, self.text)

    @cached_property
    def log_snr(self) -> tuple[float, float]:
        """The lowest and highest log-SNR at which both are asked."""
        low, high = self._levels
        return level_log_snr(high), level_log_snr(low)

    @cached_property
    def _levels(self) -> tuple[float, float]:
        bounds = [side.schedule.levels for side in (self.ours, self.theirs)]
        return max(low for low, _ in bounds), min(high for _, high in bounds)

    @cached_property
    def _call_size(self) -> int:
        """How many states a call holds; one where the texts of two prompts differ in length."""
        sides = self.ours, self.theirs
        try:
            for side in sides:
                stack_conditionings(side.table.entries)
        except ProLoRAError:
            return 1
        return min(len(side.table.like.latent) for side in sides)

    @property
    def key(self) -> str:
        """Hash of what all questions together depend on, besides the pipelines."""
        return hash_texts("across latents", *self.keys.values())

    def record_questions(self, seed: int, held_out: bool = False) -> list[Question]:
        """Questions about the images of three origins, and for the fit about pairs of images.

        The source draws the same prompts from the same noise with the LoRA and without it; each
        such pair is one trajectory, and a question about it is of the target alone. A few-step
        target has learnt the straight way from a noise to the image that its teacher draws from it,
        so it is asked on that way.
        """
        seeds = {"source": seed, "adapted": seed, "target": seed + 2}
        sampled = {origin: self._load_or_sample(origin, seeds[origin]) for origin in ORIGINS}
        levels = sampled["target"]["levels"]
        prompts = max(len(self.ours.settings.prompts), 1)
        questions = []
        drawn: dict[tuple[str, int], Tensor] = {}
        for i, origin in enumerate(ORIGINS):
            latents = sampled[origin]["latents"]
            for k, latent in enumerate(latents):
                pair = self._cross_image(origin, latent[None])
                drawn[origin, k] = pair[1]
                number = seeds[origin] * len(latents) + k
                prompt = (seeds[origin] + k) % prompts
                for state in self._draw_states(prompt, levels, len(ORIGINS) * number + i):
                    questions.append(self._ask_image(origin, pair, state, number))
                if origin == "adapted" and not held_out:
                    images = drawn["source", k], pair[1]
                    noise = self._cross_noise(sampled["source"]["noises"][k][None])
                    for state in self._draw_states(prompt, levels, -1 - number):
                        questions.append(self._pair_images(images, state, number, noise))
        return questions

    def _cross_image(self, origin: str, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both sides' latents of one image; its origin's stays as sampled."""
        sides = self.ours, self.theirs
        here, there = sides[::-1] if origin == "target" else sides
        crossed = cross_clean(here, there, latent)
        kept = here.space.as_latent(here.space.as_image(latent))
        return (crossed, kept) if origin == "target" else (kept, crossed)

    def _draw_states(self, prompt: int, levels: Tensor, seed: int) -> Iterator[DrawnStates]:
        """Yields what is drawn for one image: noise levels near the target's, in calls.

        A target of few levels is asked about each of them several times, so that it is asked as
        often as the source takes steps. A call holds as many states as both samplers' calls do.
        `levels` fall; each is moved at random towards the next.
        """
        # Samplers draw from small seeds; noise of a question must not be that of another image.
        generator = torch.Generator().manual_seed(_QUESTIONS + seed)
        gaps = torch.cat([levels[:-1] - levels[1:], levels[-1:] / 2])
        times = max(self.ours.settings.steps // len(levels), 1)
        levels, gaps = levels.repeat_interleave(times), gaps.repeat_interleave(times)
        shares = torch.rand(2, len(levels), generator=generator).double()
        at = (levels - gaps * shares[0]).clamp(*self._levels)
        share = FREE_SHARE if self.translation.guidance is None else 0.0
        rows = [-1 if free else prompt for free in (shares[1] < share).tolist()]
        for start in range(0, len(levels), self._call_size):
            part = slice(start, start + self._call_size)
            yield DrawnStates(at[part], rows[part], generator)

    def _ask_image(
        self, origin: str, pair: tuple[Tensor, Tensor], state: DrawnStates, number: int
    ) -> Question:
        """Builds both sides' calls about the two latents of one image."""
        ours, theirs = (clean.expand(len(state.levels), *clean.shape[1:]) for clean in pair)
        sides = self.ours, self.theirs
        noises = draw_noise(sides, (ours, theirs), state.generator)
        return Question(
            self._build_call(sides[0], origin, ours, noises[0], state, number),
            self._build_call(sides[1], origin, theirs, noises[1], state, number),
        )

    @staticmethod
    def _build_call(
        side: CrossingSide,
        origin: str,
        clean: Tensor,
        noise: Tensor,
        state: DrawnStates,
        number: int,
    ) -> Call:
        """Builds a side's call, as one of an origin and of a numbered image."""
        call = side.build_call(clean, noise, state.levels, state.prompts)
        numbers = (number,) * len(state.levels)
        kept = clean if origin == PAIR else None
        return replace(call, origin=origin, trajectories=numbers, clean=kept)

    def _cross_noise(self, noise: Tensor) -> Tensor | None:
        """Returns an image's noise for a target of few steps; else None.

        Only shared latents allow that.
        """
        few = takes_few_steps(self.ours.settings, self.theirs.settings)
        if not (self.ours.space.shared and few):
            return None
        return self.theirs.space.as_latent(self.ours.space.as_image(noise))

    def _pair_images(
        self,
        images: tuple[Tensor, Tensor],
        state: DrawnStates,
        number: int,
        noise: Tensor | None,
    ) -> Question:
        """Builds the target's calls about an image without and with the LoRA.

        Both have the same noise. `images` are the target's latents of both; a `noise` of None is
        drawn.
        """
        count = len(state.levels)
        cleans = [image.expand(count, *image.shape[1:]) for image in images]
        if noise is None:
            noise = torch.randn(cleans[0].shape, generator=state.generator)
        noise = noise.to(cleans[0]).expand_as(cleans[0])
        build = partial(self._build_call, self.theirs, PAIR)
        return Question(*(build(clean, noise, state, number) for clean in cleans))

    def _load_or_sample(self, origin: str, seed: int) -> dict[str, Tensor]:
        """Returns final latents of an origin's images, their noise and levels of calls."""
        side = self.theirs if origin == "target" else self.ours
        name = f"latents-{origin}-{seed}"
        key = hash_texts("latents, noises", self.keys[origin], str(seed))
        kept = self.checkpoints.recall(name, key)
        if kept is None:
            adapted = origin == "adapted"
            encoders = run_text_encoders_beside(side.pipeline, self.text if adapted else {})
            updates = self.adapter.updates if adapted else {}
            with run_beside(side.pipeline.denoiser, updates), encoders:
                sampled = self._sample(side, seed, origin)
            self.checkpoints.store(name, key, sampled)
        else:
            sampled = kept[0]
        device = side.table.like.latent.device
        on_device = {name: sampled[name].to(device) for name in ("latents", "noises")}
        return {**on_device, "levels": sampled["levels"]}

    def _sample(self, side: CrossingSide, seed: int, origin: str) -> dict[str, Tensor]:
        """Latents and noises [images, ...], and the levels of the sampler's calls, falling."""
        prompts = side.settings.prompts or ("",)
        times: list[Tensor] = []
        latents, noises = [], []
        for i in range(side.settings.images):
            prompt = prompts[(seed + i) % len(prompts)]
            number = seed * side.settings.images + i
            final = side.pipeline.sample_final(prompt, side.settings, number)
            check_sampled(final.latent, origin)
            latents.append(final.latent.float())
            noises.append(side.read_noise(final).float())
            times += final.times
            if self.on_image:
                self.on_image(origin)
        levels = torch.cat([side.schedule.level_at(time).flatten() for time in times])
        return {
            "latents": torch.cat(latents),
            "noises": torch.cat(noises),
            "levels": levels.round(decimals=6).unique().flip(0),
        }
