"""What both models are asked: images that they sample, at noise levels, and the wanted answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..core.lowrank import LowRank
from ..errors import ProLoRAError
from .kept_parts import KeptParts, hash_texts
from .sides import NO_PROMPT, FitSide, Image
from .updates import with_lora
from .workload import Meter

ORIGINS = ("source", "adapted", "target")
"""Who draws the images: the source, the source with its LoRA, the target."""
PAIR, MIXED = "pair", "mixed"
"""Origins of probes about images with the LoRA and without, and about several origins."""
FREE_SHARE = 0.1
"""Share of the samples that are asked without a prompt, as guidance asks them."""
_PROBES = 2**30  # seeds of draws for probes, beyond the samplers' seeds


@dataclass(frozen=True)
class Probe:
    """A batch of questions, and what the target should answer.

    All tensors are in the machine's memory.
    """

    origin: str  # one of ORIGINS, PAIR or MIXED
    numbers: tuple[int, ...]  # of the images; those with equal numbers came from one noise
    prompts: tuple[int, ...]  # numbers of the prompts, NO_PROMPT for none
    level: Tensor  # of the noise [n]
    # The source's state a·x₀ + b·ε [n, ...]; of a PAIR the target's, of the image without the LoRA
    source: Tensor
    target: Tensor  # the target's state; of a PAIR that of the image with the LoRA
    clean: tuple[Tensor, Tensor] | None = None  # x₀ of the two images of a PAIR
    plain: Tensor = field(default_factory=Tensor)  # the target's prediction without updates
    # Source with LoRA minus source, in the target's terms, and the share of source minus target
    # that the look asks for; for a PAIR, what the target misses of the image with the LoRA beyond
    # what it misses of the other.
    change: Tensor = field(default_factory=Tensor)
    # Target minus source, both without updates; for a PAIR, target minus image
    difference: Tensor = field(default_factory=Tensor)

    def __len__(self) -> int:
        """Returns the number of questions."""
        return len(self.numbers)


@dataclass(frozen=True)
class DrawnImages:
    """The images of three origins, as the latents of either side.

    Each is origin -> [images, ...].
    """

    source: Mapping[str, Tensor]
    target: Mapping[str, Tensor]
    noises: Tensor  # of the source's images, as its latents
    levels: Tensor  # of the target's sampler, falling
    seeds: Mapping[str, int]  # origin -> seed; the same noise where equal


@dataclass(frozen=True)
class Asking:
    """Both sides of a fit, and how they are asked."""

    source: FitSide
    target: FitSide
    updates: Mapping[str, LowRank]  # the LoRA's, by module of the source
    guidance: float = 1.0  # that the source answers with, as the target has none; 1 for none
    look: float = 0.0  # the share of the source's own look that is wanted
    pairs: bool = False  # whether half of the fit follows pairs of images
    few: bool = False  # whether the target takes half the source's steps or fewer
    # Origin -> hash of what its images depend on beside seed and files, for parts that are kept
    keys: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(ORIGINS, ""))

    @property
    def shared(self) -> bool:
        """Whether both denoise the same latents."""
        return self.source.space.shared

    @property
    def levels(self) -> tuple[float, float]:
        """The lowest and highest noise level at which both are asked."""
        bounds = [side.schedule.levels for side in (self.source, self.target)]
        return max(low for low, _ in bounds), min(high for _, high in bounds)

    @property
    def at_once(self) -> int:
        """Samples of one call of either model."""
        return min(self.source.at_once, self.target.at_once)

    def draw_images(self, seed: int, count: int, parts: KeptParts, meter: Meter) -> DrawnImages:
        """Samples images of each of ORIGINS, or reads them from an earlier fit."""
        adapted = seed if self.pairs else seed + 1
        seeds = {"source": seed, "adapted": adapted, "target": seed + 2}
        drawn = {}
        for origin, start in seeds.items():
            side = self.target if origin == "target" else self.source
            name, key = f"images-{origin}-{start}", hash_texts(self.keys[origin], str(count))
            found = parts.recall(name, key)
            if found is None:
                images = self._sample(side, origin, start, count, meter)
                parts.store(name, key, images)
            else:
                images = found[0]
                meter.advance(1 / 6, f"images of {side.name} were kept", kept=True)
            drawn[origin] = images
        ours, theirs = {}, {}
        for origin, images in drawn.items():
            here, there = self.source, self.target
            if origin == "target":
                here, there = there, here
            latents = images["latents"].to(here.device)
            crossed = torch.cat([here.cross(latent[None], there) for latent in latents]).cpu()
            own = here.space.as_latent(here.space.as_image(latents)).cpu()
            ours[origin], theirs[origin] = (crossed, own) if origin == "target" else (own, crossed)
        noises, levels = drawn["source"]["noises"], drawn["target"]["levels"]
        return DrawnImages(ours, theirs, noises, levels, seeds)

    def _sample(
        self, side: FitSide, origin: str, seed: int, count: int, meter: Meter
    ) -> dict[str, Tensor]:
        """Samples latents and noises [images, ...], and the levels of all calls, falling."""
        adapted, images = origin == "adapted", list[Image]()
        encoders = side.run_text_encoders() if adapted else nullcontext()
        with with_lora(side.denoiser, self.updates if adapted else {}), encoders:
            for i in range(count):
                image = side.sample(seed * count + i, (seed + i) % side.prompts)
                check_sampled(image.latent, origin)
                images.append(image)
                meter.advance(1 / (6 * count), f"sampling {side.name}{' + LoRA' * adapted}")
        levels = torch.cat([image.levels for image in images]).double()
        return {
            "latents": torch.cat([image.latent.float() for image in images]),
            "noises": torch.cat([image.noise.float() for image in images]),
            "levels": levels.round(decimals=6).unique().flip(0),
        }

    def draw_probes(
        self, images: DrawnImages, count: int, size: int, seed: int, held_out: bool = False
    ) -> Iterator[Probe]:
        """Draws and answers about `count` questions on images, in batches of `size`.

        For a fit, batches mix origins, images and levels; with pairs, half are about pairs. Held
        out, each is about one origin.
        """
        generator = torch.Generator().manual_seed(_PROBES + seed)
        number = len(images.source["source"])
        if held_out:
            share = max(count // len(ORIGINS), 1)
            groups = [([(o, k) for k in range(number)], share) for o in ORIGINS]
        else:
            share = max(count // (1 + self.pairs), 1)
            groups = [([(o, k) for o in ORIGINS for k in range(number)], share)]
            if self.pairs:
                groups.append(([(PAIR, k) for k in range(number)], share))
        batches = [list(self._batch(images, *group, size, generator)) for group in groups]
        longest = max(map(len, batches))
        for i in range(longest):  # of pairs and of states in turn
            for group in batches:
                if i < len(group):
                    yield self._answer(self._ask(images, *group[i]))

    def _batch(
        self,
        images: DrawnImages,
        whose: Sequence[tuple[str, int]],
        count: int,
        size: int,
        generator: torch.Generator,
    ) -> Iterator[tuple[list[tuple[str, int]], Tensor, Tensor, int]]:
        """Yields images, levels, draws for prompts and a seed of noise, for every batch.

        Every image is asked about as often, at levels of the target's sampler, each moved at random
        towards the next.
        """
        levels = images.levels
        gaps = torch.cat([levels[:-1] - levels[1:], levels[-1:] / 2])
        every = [(image, step) for image in whose for step in range(len(levels))]
        rows = list[tuple[tuple[str, int], int]]()
        while len(rows) < count:
            rows += [every[i] for i in torch.randperm(len(every), generator=generator).tolist()]
        for start in range(0, count, size):
            part = rows[start : min(start + size, count)]
            steps = torch.tensor([step for _, step in part])
            shares = torch.rand(2, len(part), generator=generator).double()
            at = (levels[steps] - gaps[steps] * shares[0]).clamp(*self.levels)
            noise = int(torch.randint(2**62, (), generator=generator))
            yield [image for image, _ in part], at, shares[1], noise

    def _ask(
        self,
        images: DrawnImages,
        whose: Sequence[tuple[str, int]],
        level: Tensor,
        free: Tensor,
        seed: int,
    ) -> Probe:
        generator = torch.Generator().manual_seed(seed)
        origins = {origin for origin, _ in whose}
        origin = origins.pop() if len(origins) == 1 else MIXED
        drawn = ["adapted" if origin == PAIR else origin for origin, _ in whose]
        count = len(images.source["source"])
        numbers = [images.seeds[o] * count + k for o, (_, k) in zip(drawn, whose, strict=True)]
        prompts = [
            (images.seeds[o] + k) % self.source.prompts
            for o, (_, k) in zip(drawn, whose, strict=True)
        ]
        if self.guidance == 1:
            without = (free < FREE_SHARE).tolist()
            prompts = [NO_PROMPT if no else i for i, no in zip(prompts, without, strict=True)]

        def pick(side: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
            return torch.stack([side[o][k] for o, (_, k) in zip(names, whose, strict=True)])

        ours, theirs = self.source, self.target
        after = pick(images.target, drawn)
        if origin == PAIR:
            before = pick(images.target, ["source"] * len(whose))
            if self.few and self.shared:  # on the way that a student has learnt
                noises = torch.stack([images.noises[k] for _, k in whose])
                noise = theirs.space.as_latent(ours.space.as_image(noises))
            else:
                noise = torch.randn(after.shape, generator=generator)
            states = theirs.mix(before, noise, level), theirs.mix(after, noise, level)
            return Probe(origin, (*numbers,), (*prompts,), level, *states, (before, after))
        before = pick(images.source, drawn)
        noise, noise_there = self._draw_noise(before, after, generator)
        states = ours.mix(before, noise, level), theirs.mix(after, noise_there, level)
        return Probe(origin, (*numbers,), (*prompts,), level, *states)

    def _draw_noise(
        self, source: Tensor, target: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draws noise of either side's latents: equal for shared ones."""
        if not self.shared:
            first = torch.randn(source.shape, generator=generator)
            return first, torch.randn(target.shape, generator=generator)
        noise = torch.randn(self.source.space.as_image(source).shape, generator=generator)
        return self.source.space.as_latent(noise), self.target.space.as_latent(noise)

    @torch.no_grad()
    def _answer(self, probe: Probe) -> Probe:
        """Asks both models, and returns what the target should do.

        With predictions v, and v' with the LoRA, the change is (v_s' − v_s) + look·(v_s − v_t): at
        look 0 the target keeps its own look, at 1 it predicts what the source with the LoRA does.
        """
        theirs = self.target
        level, prompts = probe.level, probe.prompts
        plain = theirs.predict(probe.target, level, prompts)
        if probe.clean is not None:
            return self._answer_pair(probe, plain)
        before = self._ask_source(probe, adapted=False)
        with with_lora(self.source.denoiser, self.updates):
            after = self._ask_source(probe, adapted=True)
        change = after - before + self.look * (before - plain)
        return replace(
            probe, plain=plain.cpu(), change=change.cpu(), difference=(plain - before).cpu()
        )

    def _ask_source(self, probe: Probe, adapted: bool) -> Tensor:
        """Returns the source's prediction in the target's terms, guided where it should be."""
        ours, free = self.source, [NO_PROMPT] * len(probe)
        state = probe.source.to(ours.device)
        prediction = ours.predict(state, probe.level, probe.prompts, adapted)
        if self.guidance != 1:
            without = ours.predict(state, probe.level, free, adapted)
            prediction = without + self.guidance * (prediction - without)
        states = state, probe.target.to(self.target.device)
        return ours.convert(self.target, states, probe.level, prediction)

    def _answer_pair(self, probe: Probe, plain: Tensor) -> Probe:
        """Computes what the target misses of an image with the LoRA alone.

        With r = wanted − predicted for either image, at one noise, the change is r' − s·r, where s
        is the slope of r' on r, sample by sample and within 0 … 1, times 1 − look. So at look 0
        neither the style of the source nor noise that both images share is learnt.
        """
        assert probe.clean is not None
        theirs, level, device = self.target, probe.level, plain.device
        states = probe.source.to(device), probe.target.to(device)
        plain_before = theirs.predict(probe.source, level, probe.prompts)
        missing_before, missing = (
            theirs.predict_clean(state, level, clean.to(device)) - answer
            for state, clean, answer in zip(states, probe.clean, (plain_before, plain), strict=True)
        )
        rows = [part.flatten(1) for part in (missing, missing_before)]
        slope = (rows[0] * rows[1]).sum(1) / rows[1].square().sum(1).clamp_min(1e-30)
        slope = (1 - self.look) * slope.clamp(0, 1).reshape(-1, *[1] * (missing.dim() - 1))
        change = missing - slope * missing_before
        return replace(
            probe,
            clean=None,
            plain=plain.cpu(),
            change=change.cpu(),
            difference=-missing_before.cpu(),
        )


def check_sampled(latent: Tensor, origin: str) -> None:
    """Refuses a sampling with NaN or Inf before more of it is done."""
    if not bool(torch.isfinite(latent).all()):
        whose = "source with its LoRA" if origin == "adapted" else origin
        raise ProLoRAError(
            f"sampling the {whose} makes NaN or Inf: its weights are damaged, or the settings of "
            "the sampling do not suit it"
        )
