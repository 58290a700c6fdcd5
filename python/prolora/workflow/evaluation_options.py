"""The choices of an evaluation: what is drawn, and what judges it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, TypedDict, get_args

from ..bases.base import Progress
from ..core.methods import MethodChoice
from ..core.option_fields import option, take_option
from ..core.validation import DeviceLike
from ..errors import InvalidOption
from ..probe.settings import FitSettings
from .options import TransferOptions, check_choice

JUDGING = "Judging"
LORA, TRAINED = "lora", "trained"
"""What images may be compared with, beside those of a folder."""
_USED = {"prompts", "images", "seed", "shown_prompts"}
_SAMPLED = "steps size guidance target_steps target_guidance lora_steps lora_guidance".split()
DRAWN = FitSettings(images=4, shown_prompts=4)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is drawn, and what judges it; `evaluate` takes each of these by its name."""

    sampling: FitSettings = option(
        DRAWN,
        "Prompts (by default some that are made from the LoRA's header), `images` of each prompt, "
        "steps, size, guidance, seed, and how many of the prompts the page shows.",
    )
    methods: tuple[MethodChoice, ...] = option(
        (),
        "Ways in which the LoRA is moved by its weights alone and drawn, beside the files. The "
        "copy is always drawn.",
    )
    trained: str | PathLike[str] | None = option(
        None,
        "The LoRA trained on the target, which sets the scale; for several LoRAs a folder that has "
        "one of the same name for each.",
        panel=JUDGING,
        metavar="LORA",
    )
    metrics: Mapping[str, Any] | None = option(
        None,
        "What judges the images: a name (clip, dinov2, csd, hpsv2, pickscore) and the folder of "
        "its model, or a function (images, prompts, references) -> {score: a number for each "
        "image}. Nothing is downloaded.",
    )
    reference: str | PathLike[str] = option(
        LORA,
        'What the images should look like: "lora", those of the source with the LoRA; "trained", '
        "those of the target with the LoRA trained on it; or a folder of images.",
        panel=JUDGING,
        metavar="lora|trained|FOLDER",
    )
    again: bool = take_option(TransferOptions, "again", panel=JUDGING)
    overwrite: bool = take_option(
        TransferOptions,
        "overwrite",
        help="Replace JSON and page that the folder has of other files or settings, or that were "
        "changed since. Images are kept in any case.",
        panel=JUDGING,
    )
    cache: str | PathLike[str] | None = take_option(TransferOptions, "cache")
    device: DeviceLike = take_option(TransferOptions, "device")
    progress: Progress | None = take_option(TransferOptions, "progress")

    def __post_init__(self) -> None:
        """Refuses values that no evaluation can use, before anything is read.

        Raises:
            InvalidOption: names the option and what it takes.
            UnsupportedDevice: there is no such device, or it cannot be used.
        """
        for known in fields(FitSettings):
            unused = known.name not in {*_USED, *_SAMPLED}
            if unused and getattr(self.sampling, known.name) != known.default:
                raise InvalidOption(f"`sampling`: {known.name} is of a fit; nothing here uses it")
        for method in self.methods:
            check_choice("methods", method, get_args(MethodChoice))  # none runs the models
        if self.reference == TRAINED and self.trained is None:
            raise InvalidOption(
                "`reference='trained'` compares with a LoRA trained on the target: give it as "
                "`trained`"
            )
        object.__setattr__(self, "device", self.as_moved("copy").device)

    @property
    def settings(self) -> dict[str, int | float | None]:
        """How each image is sampled, ready for JSON."""
        return {name: getattr(self.sampling, name) for name in _SAMPLED}

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the images of each prompt."""
        return tuple(range(self.sampling.seed, self.sampling.seed + self.sampling.images))

    def as_moved(self, method: MethodChoice) -> TransferOptions:
        """How the LoRA is moved by its weights alone."""
        known: dict[str, Any] = {n: getattr(self, n) for n in ("again", "cache", "device")}
        return TransferOptions(method=method, **known)


class EvaluationChanges(TypedDict, total=False):
    """The fields of `EvaluationOptions` as keywords, for type checkers; a test compares the two."""

    sampling: FitSettings
    methods: tuple[MethodChoice, ...]
    trained: str | PathLike[str] | None
    metrics: Mapping[str, Any] | None
    reference: str | PathLike[str]
    again: bool
    overwrite: bool
    cache: str | PathLike[str] | None
    device: DeviceLike
    progress: Progress | None


DEFAULT_EVALUATION = EvaluationOptions()
