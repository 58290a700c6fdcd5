"""The settings of a fit: what is sampled, how it is fitted, what is written."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Literal, TypeVar, get_args

from ..bases.base import Progress
from ..bases.pipeline_files import MOST_FEW_STEPS
from ..comparison.module_map import Match
from ..core.arrays import make_fields_plain
from ..core.methods import MethodChoice
from ..errors import InvalidOption, UnsupportedFormat
from ..files.sizes import parse_limit
from ..files.untrusted import read_text
from ..verbs.option_fields import option, read_shown, take_option
from ..verbs.options import BaseResources, FileOutput, TransferOptions

LOOKS = {"target": 0.0, "source": 1.0}
"""Name of a look -> share of the source's own look that the fit is to bring along."""

Precision = Literal["auto", "float32", "bfloat16"]
"""In what the models compute: chosen, or by autocast in 16 bits."""

AUTO: Precision = "auto"
FLOAT32: Precision = "float32"
BFLOAT16: Precision = "bfloat16"
FEW_STEPS = 4
"""Steps of targets whose files say that they draw in few, unless another number is asked."""
MAX_SAMPLES = (1152, 192, 48)
"""Largest default number of samples for the fit, for the verdict, and of one step."""
SHOWN = 4
"""Prompts of which the page of a report shows images."""
SAMPLING, FITTING = "Sampling", "Fit"

# Settings that the fitted updates depend on, beside the questions; and the samples.
_OF_FIT = "rank", "probes", "held_out", "fit_steps", "batch", "seed", "precision"
_OF_SAMPLES = "prompts", "images", "steps", "size", "guidance", "precision"

_LEAST = dict.fromkeys(
    ("images", "steps", "fit_steps", "size", "target_steps", "probes", "held_out", "batch"), 1
) | {"seed": 0, "shown_prompts": 0}
"""Option -> the least whole number that it takes."""

Settings = TypeVar("Settings", bound="FitSettings")


@dataclass(frozen=True)
class FitSettings:
    """What a fit samples of the running models, and its method (docs/fit.md)."""

    prompts: tuple[str, ...] = take_option(TransferOptions, "prompts")
    images: int = option(
        24,
        "Images of each sampling: of the source, the source with the LoRA and the target for the "
        "fit, and again of these three for the verdict.",
        panel=SAMPLING,
        metavar="N",
    )
    steps: int = option(25, "Steps of the samplers.", panel=SAMPLING, metavar="N")
    size: int | None = option(
        None,
        "Height and width of the images in pixels. Default: the smaller of the two pipelines', or "
        "that of each where their latents differ.",
        panel=SAMPLING,
        metavar="PIXELS",
    )
    guidance: float | None = option(
        None,
        "Guidance scale of the samplers. Default: each pipeline's own.",
        panel=SAMPLING,
        metavar="SCALE",
    )
    target_steps: int | None = option(
        None,
        "Steps of the target's own sampler, where it is a few-step model. Default: as for the "
        "source, or 4 where its files say that it draws in few.",
        panel=SAMPLING,
        metavar="N",
    )
    target_guidance: float | None = option(
        None,
        "Guidance scale of the target's own sampler; 1 for a target that is run without. Default: "
        "as for the source, or 1 where the target draws in few steps and takes no scale. A source "
        "with guidance and a target without are asked accordingly.",
        panel=SAMPLING,
        metavar="SCALE",
    )
    look: float | str = take_option(TransferOptions, "look", panel=FITTING)
    rank: float | None = option(
        None,
        "Rank of every update that is fitted and written. A number below 1 is the share of each "
        "update, as the probes see it, that must be kept. Default: the LoRA's own, which is its "
        "largest.",
        panel=FITTING,
        metavar="RANK",
    )
    fit_steps: int = option(
        32,
        "Gauss–Newton steps; the time of the fit is proportional to them. A fit that starts from "
        "no update takes two of Adam's for each of the second half.",
        panel=FITTING,
        metavar="N",
    )
    probes: int | None = option(
        None, "Samples for the fit, drawn from the samplers' calls. Default: what the rank needs."
    )
    held_out: int | None = option(None, "Samples for the verdict. Default: what the fit needs.")
    batch: int | None = option(
        None, "Least number of samples of a step. Default: what the rank needs."
    )
    seed: int = option(
        0,
        "Seed of the first of three samplings; they use three seeds, the held-out ones the next "
        "three.",
    )
    precision: Precision = option(
        AUTO,
        'What the models compute in, while the LoRA and all sums stay in float32: "float32", or '
        '"bfloat16" by autocast. "auto" is bfloat16 where `max_vram` leaves too little room for '
        "float32.",
        words=get_args(Precision),
    )
    force: bool = option(
        False,
        "Write the fitted LoRA even if the held-out probes speak against it.",
        panel=FITTING,
    )
    resume: str | PathLike[str] | None = option(
        None,
        "Folder that keeps finished parts, so that an interrupted fit can go on. What does not "
        "depend on the LoRA serves the next one; files that are damaged or belong to other inputs "
        "are computed again.",
        panel=FITTING,
        metavar="FOLDER",
        decides=False,
    )
    shown_prompts: int = option(
        0,
        "Prompts of which the page of the report shows images: of the source and the target, with "
        "the LoRA and without. They take time of their own.",
        decides=False,
    )
    progress: Progress | None = option(
        None,
        "Called as progress(done, total, name); what it raises ends the call, and nothing is "
        "written.",
        decides=False,
    )

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InvalidOption: names the option and the values that it takes.
        """
        make_fields_plain(self)
        several = isinstance(self.prompts, tuple | list)
        if not several or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise InvalidOption(f"prompts must be a tuple of texts, not {self.prompts!r}")
        object.__setattr__(self, "prompts", tuple(self.prompts))
        for known in fields(FitSettings):
            name, value = known.name, getattr(self, known.name)
            words = read_shown(known).words
            if words and value not in words:
                raise InvalidOption(f"{name} must be one of {', '.join(words)}, not {value!r}")
            if name in _LEAST and (value is not None or known.default is not None):
                _check_count(name, value, _LEAST[name])
            if name in ("guidance", "target_guidance") and not (value is None or _is_number(value)):
                raise InvalidOption(f"{name} must be a number, not {value!r}")
        if self.size is not None and self.size % 8:
            raise InvalidOption(f"size must be a multiple of 8 pixels, not {self.size}")
        if self.rank is not None:
            rank = self.rank
            if not _is_number(rank) or rank <= 0 or (rank > 1 and rank != int(rank)):
                raise InvalidOption(
                    "rank must be an integer of 1 or more, or a share between 0 and 1, not "
                    f"{rank!r}"
                )
        is_share = _is_number(self.look) and 0 <= float(self.look) <= 1
        if not is_share and self.look not in [*LOOKS]:
            raise InvalidOption(
                f'look must be "target", "source" or a number from 0 to 1, not {self.look!r}'
            )

    def for_target(self: Settings, few: bool, embeds_guidance: bool) -> Settings:
        """Returns the settings of the target's own sampler.

        Args:
            few: whether its files say that it draws in few steps.
            embeds_guidance: whether it takes its guidance scale as an input.
        """
        asked, guidance = self.target_steps, self.target_guidance
        if guidance is None:
            guidance = self.guidance
            student = few or (asked is not None and asked <= MOST_FEW_STEPS)
            if guidance is None and student and not embeds_guidance:
                guidance = 1.0
        return replace(
            self,
            steps=asked or (min(FEW_STEPS, self.steps) if few else self.steps),
            guidance=guidance,
            target_steps=None,
            target_guidance=None,
        )

    def sized(self: Settings, recorded: int) -> Settings:
        """Replaces None by numbers, so that fit and verdict take a bounded time.

        One sample costs one forward pass when it is recorded, three as a probe (source, source with
        LoRA, target), five in a step (a backward pass costs about two) and about seven in the
        verdict. Together fit and verdict then take about three times the sampling. More than
        MAX_SAMPLES of each gain little (docs/results.md).
        """
        probes, held_out, batch = (
            max(1, min(most, int(share * recorded)))
            for most, share in zip(MAX_SAMPLES, (0.23, 0.05, 0.39 / self.fit_steps), strict=True)
        )
        return replace(
            self,
            probes=self.probes or probes,
            held_out=self.held_out or max(held_out, 24),
            batch=self.batch or max(batch, 4),
        )

    @property
    def look_of_source(self) -> float:
        """The share of the source's own look that is wanted, 0 to 1."""
        return LOOKS[self.look] if isinstance(self.look, str) else float(self.look)

    def describe_fit(self) -> str:
        """Returns the settings that fitted updates depend on, as a text.

        The samples have another.
        """
        return repr({name: getattr(self, name) for name in _OF_FIT} | {"look": self.look_of_source})

    def describe_samples(self) -> dict[str, object]:
        """Returns the settings that samples depend on, once a side's own are settled."""
        return {name: getattr(self, name) for name in _OF_SAMPLES}


def read_prompts(file: str | PathLike[str]) -> tuple[str, ...]:
    """Reads the lines of a text file, without empty ones."""
    try:
        lines = read_text(file).splitlines()
    except UnsupportedFormat as error:
        raise InvalidOption(f"{file}: cannot be read as text: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise InvalidOption(f"{file}: has no prompts (one per line is expected)")
    return prompts


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and abs(value) <= sys.float_info.max


def _check_count(name: str, value: object, least: int) -> None:
    """Refuses an option that is no whole number, or one below the least."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidOption(f"{name} must be an integer of {least} or more, not {value!r}")


PassedOn = Literal["copy", "skip"]
"""What may become of a LoRA's text-encoder part where the models are run."""


@dataclass(frozen=True, kw_only=True)
class FitOptions(FileOutput, BaseResources, FitSettings):
    """How a LoRA is fitted to a running target; `fit` takes each of these by its name."""

    text_encoder: PassedOn = take_option(
        TransferOptions,
        "text_encoder",
        help='The LoRA\'s text-encoder part: "copy" it where the target has the same encoder, or '
        '"skip" it. It is not fitted.',
        panel="",
        words=get_args(PassedOn),
    )
    match: Match = take_option(
        TransferOptions,
        "match",
        help="How modules are paired for the LoRA moved by weights alone, which the fit is "
        "compared with and may start from; as in a transfer.",
        panel="",
    )
    again: bool = take_option(TransferOptions, "again", panel=FITTING)
    pictures: str | PathLike[str] | None = option(
        None,
        "Folder of four or more pictures (better 20) of what the LoRA is for, in the target's own "
        "look, with captions beside (`a.png`, `a.txt`) or in `prompts`. The target alone runs: the "
        "copy at 0.6 is trained on them for at most 120 steps, with `images` of its own samples "
        "beside, so that it forgets little. A source is of use where weights move nothing.",
        panel=FITTING,
        metavar="FOLDER",
    )
    max_vram: int | str | None = option(
        None,
        'Memory of the card that may be taken, as "12GB". Where it is too little, the fit computes '
        "in 16 bits, decodes in tiles, takes smaller batches, and at last brings blocks from the "
        "machine's memory one by one. Refused where that does not do. For pipelines in folders; "
        "models at hand refuse it.",
        panel=FITTING,
        metavar="SIZE",
    )

    def __post_init__(self) -> None:
        """Refuses values that no fit can use, before anything is read.

        Raises:
            InvalidOption: names the option and what it takes.
            UnsupportedDevice: there is no such device, or it cannot be used.
        """
        FitSettings.__post_init__(self)
        super().__post_init__()
        if self.pictures is not None:
            object.__setattr__(self, "pictures", Path(self.pictures))  # counts by its contents
        self.card_limit  # noqa: B018 (raises where it is no size)
        self.transfer_options("auto")

    @property
    def card_limit(self) -> int | None:
        """`max_vram` in bytes."""
        return parse_limit(self.max_vram, "max_vram")

    def transfer_options(self, method: MethodChoice) -> TransferOptions:
        """Returns the options for moving by weights alone, for comparison."""
        return TransferOptions(
            method=method,
            text_encoder=self.text_encoder,
            match=self.match,
            again=True,  # the bases were looked at before
            format=self.format,
            dtype=self.dtype,
            cache=self.cache,
            device=self.device,
            max_memory=self.max_memory,
        )


DEFAULT_FIT = FitOptions()
