"""Diffusers pipeline folders as the two models and samplers that probing needs."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import vae
from ..bases.folder import MODELS, choose_candidate, open_folder_weights
from ..errors import ProLoRAError, UnsupportedFormat
from ..files.jsontext import read_json_object
from . import schedules
from .conditioning import Conditioning, PromptTable, build_call, sample_conditioning, split_call
from .hooks import FirstCallReached, capture_first_call, keep_hooks
from .precision import HALVES
from .schedules import Schedule
from .settings import Probing
from .trajectories import Call, Sample, output_of
from .translation import Translation

_FITTING = ("force", "resume", "strategy", "fit_steps")  # nothing to do with what is sampled
# None of these runs when latents are asked for; a pipeline works without them.
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


class Pipeline:
    """A loaded pipeline: its denoiser and how to run it to the end, or to the first call."""

    def __init__(self, pipe: Any, name: str) -> None:
        """Around a diffusers pipeline; `name` is for messages.

        Raises:
            UnsupportedFormat: it has neither unet nor transformer, or another kind of scheduler.
        """
        self.pipe, self.name = pipe, name
        found = next((part for part in MODELS if getattr(pipe, part, None) is not None), None)
        if found is None:
            raise UnsupportedFormat(f"{name}: its {type(pipe).__name__} has no unet or transformer")
        self.denoiser: nn.Module = getattr(pipe, found)
        self.schedule = Schedule.of(pipe.scheduler, name)
        self.accepted = inspect.signature(type(pipe).__call__).parameters
        pipe.set_progress_bar_config(disable=True)

    @property
    def size(self) -> int | None:
        """Height in pixels that the pipeline chooses by itself, where that can be told."""
        if "height" not in self.accepted:
            return None
        config: Any = self.denoiser.config
        sample = getattr(config, "sample_size", None)
        sample = getattr(self.pipe, "default_sample_size", sample)
        sample = sample[0] if isinstance(sample, list | tuple) else sample
        scale = getattr(self.pipe, "vae_scale_factor", None)
        return sample * scale if isinstance(sample, int) and isinstance(scale, int) else None

    @property
    def channels(self) -> int:
        """Of the latents, as the denoiser takes them."""
        config: Any = self.denoiser.config
        return int(config.in_channels)

    def run(self, prompt: str, settings: Probing, seed: int) -> None:
        """Samples one image's latents from noise.

        Raises:
            ProLoRAError: the pipeline asks for something else, an image for example.
        """
        given: dict[str, Any] = {
            "num_inference_steps": settings.steps,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(seed),
            "height": settings.size,
            "width": settings.size,
            "guidance_scale": settings.guidance,
            "use_resolution_binning": False,
            "clean_caption": False,
        }
        if "class_labels" in self.accepted:
            given["class_labels"] = [_class_number(prompt, self.name)]
        elif "prompt" in self.accepted:
            given["prompt"] = prompt
        given = {k: v for k, v in given.items() if k in self.accepted and v is not None}
        hook = self.denoiser.register_forward_pre_hook(
            _one_time_a_sample, with_kwargs=True, prepend=True
        )
        with keep_hooks([hook]):
            try:
                with torch.no_grad():
                    self.pipe(**given)
            except (FirstCallReached, ProLoRAError):
                raise
            except Exception as error:  # diffusers and models raise what they like
                raise ProLoRAError(
                    f"{self.name}: its {type(self.pipe).__name__} cannot sample from a prompt "
                    f"alone: {type(error).__name__}: {error}"
                ) from error

    def sampler(self, settings: Probing, done: Callable[[], None] | None = None) -> Sample:
        """Samples every image of one set of trajectories, prompts in turn; calls `done` after each.

        The images of a seed share no noise with those of any other.
        """
        prompts = _prompts_or_empty(settings)

        def sample(seed: int) -> None:
            for i in range(settings.images):
                prompt = prompts[(seed + i) % len(prompts)]
                self.run(prompt, settings, seed * settings.images + i)
                if done:
                    done()

        return sample

    def book(self, settings: Probing) -> PromptTable:
        """What the denoiser is told for each prompt, seen in the first call of a sampling.

        The unconditional branch of the guidance comes last; without guidance, the empty prompt.
        """
        entries: list[Conditioning] = []
        negative: Conditioning | None = None
        for prompt in _prompts_or_empty(settings):
            first = self._first_call(prompt, settings)
            found = split_call(self.denoiser, first)
            if len(found.latent) > 2:
                raise ProLoRAError(
                    f"{self.name}: its {type(self.pipe).__name__} guides by more than two "
                    "branches, which probing does not know"
                )
            entries.append(sample_conditioning(found, len(found.latent) - 1))
            if len(found.latent) == 2:
                # DiT puts the conditional sample first, all others the unconditional.
                swapped = "class_labels" in self.accepted
                negative = sample_conditioning(found, int(swapped))
                entries[-1] = sample_conditioning(found, int(not swapped))
        if negative is None and "class_labels" not in self.accepted:
            empty = self._first_call("", settings)
            negative = sample_conditioning(split_call(self.denoiser, empty), 0)
        return PromptTable(self.denoiser, [*entries, negative or entries[-1]], found.time)

    def _first_call(self, prompt: str, settings: Probing) -> Call:
        inputs = capture_first_call(self.denoiser, lambda: self.run(prompt, settings, 0))
        if inputs is not None:
            return Call(*inputs)
        raise ProLoRAError(f"{self.name}: its {type(self.pipe).__name__} never ran its denoiser")


def _one_time_a_sample(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with a time for every sample, so that samples of many moments mix."""
    found = split_call(model, Call(args, kwargs))
    if found.time.dim():
        return args, kwargs
    call = build_call(model, replace(found, time=found.time.expand(len(found.latent)).clone()))
    return call.args, call.kwargs


def open_pipeline(folder: Path, device: str | None = None) -> Pipeline:
    """Loads a diffusers pipeline folder, all of it from safetensors.

    The denoiser stays in the half precision it is stored in (see `precision`); all else is float32.

    Raises:
        UnsupportedFormat: no pipeline folder, code of its own, weights as pickles only, or
            diffusers (transformers, for text encoders) is missing or cannot load it.
    """
    index = _checked_index(folder)
    try:
        import diffusers
    except ImportError as error:
        raise UnsupportedFormat(
            'probing runs the models through diffusers: pip install "prolora[probe]"'
        ) from error
    class_ = getattr(diffusers, index["_class_name"], None)
    if class_ is None:
        raise UnsupportedFormat(
            f"{folder}: diffusers {diffusers.__version__} has no {index['_class_name']}; "
            "pip install -U diffusers"
        )
    part = next(part for part in MODELS if isinstance(index.get(part), list))
    best = choose_candidate(file.name for file in (folder / part).glob("*"))
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    if best is not None and best.variant:
        options["variant"] = best.variant
    try:
        with _no_bars(diffusers):
            denoiser = getattr(diffusers, index[part][1]).from_pretrained(
                folder / part, torch_dtype=_stored_dtype(folder / part), **options
            )
            unused = {name: None for name in _UNUSED if name in index}
            pipe = class_.from_pretrained(folder, **{part: denoiser}, **unused, **options)
    except ImportError as error:
        raise UnsupportedFormat(
            f'{folder}: a package is missing: {error}; pip install "prolora[probe]"'
        ) from error
    except Exception as error:  # which one depends on what is missing in the folder
        raise UnsupportedFormat(
            f"{folder}: diffusers cannot load this pipeline from safetensors: "
            f"{type(error).__name__}: {error}. Pickles are not read: save it anew with "
            "pipe.save_pretrained(FOLDER, safe_serialization=True)"
        ) from error
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            model.eval()
            if model is not denoiser:
                model.float()  # text encoders may come in the dtype they were saved in
    return Pipeline(pipe.to(device or "cpu"), folder.name)


def _stored_dtype(folder: Path) -> torch.dtype:
    """The dtype a model is stored in, if all of it is in one half precision; else float32."""
    dtypes = {weight.dtype for weight in open_folder_weights(folder)[0].values()}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(HALVES) else torch.float32


@contextmanager
def _no_bars(diffusers: Any) -> Iterator[None]:
    """Without the libraries' own progress bars, which would run into ours."""
    found = [diffusers.utils.logging]
    with suppress(ImportError):
        import transformers

        found.append(transformers.utils.logging)
    shown = [logging for logging in found if logging.is_progress_bar_enabled()]
    for logging in shown:
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch_dtype gets another name
            yield
    finally:
        for logging in shown:
            logging.enable_progress_bar()


def _checked_index(folder: Path) -> dict[str, Any]:
    """model_index.json, refused where loading it would run code that is not diffusers' own."""
    if not vae.is_pipeline(folder):
        raise UnsupportedFormat(
            f"{folder}: --method probe runs the models, so each base must be the folder of a whole "
            f"diffusers pipeline ({vae.PIPELINE_INDEX}, scheduler, text encoders, unet or "
            "transformer); "
            "weights alone cannot be sampled"
        )
    index = read_json_object(folder / vae.PIPELINE_INDEX)
    if not isinstance(index.get("_class_name"), str):
        raise UnsupportedFormat(f"{folder / vae.PIPELINE_INDEX}: names no class of diffusers")
    for name, value in index.items():
        if isinstance(value, list) and name not in _UNUSED and value[0] is not None:
            if value[0] not in ("diffusers", "transformers"):
                raise UnsupportedFormat(
                    f"{folder / vae.PIPELINE_INDEX}: {name} comes from {value[0]!r}, which "
                    "is code of "
                    "its own; probing runs nothing but diffusers and transformers"
                )
    if not any(isinstance(index.get(part), list) for part in MODELS):
        raise UnsupportedFormat(f"{folder}: the pipeline has no unet or transformer")
    return index


def _prompts_or_empty(settings: Probing) -> tuple[str, ...]:
    return settings.prompts or ("",)


def _class_number(prompt: str, name: str) -> int:
    try:
        return int(prompt or "0")
    except ValueError:
        raise ValueError(
            f"{name} takes classes and no texts: give their numbers as prompts, not {prompt!r}"
        ) from None


@dataclass(frozen=True)
class PipelinePair:
    """Two pipelines that can be asked the same questions.

    Attributes:
        source, target: the pipelines.
        settings: with the size settled.
        between: turns calls and predictions of one into the other's.
    """

    source: Pipeline
    target: Pipeline
    settings: Probing
    between: Translation

    def told(self) -> str:
        """What the samplers do, besides the weights they run: part of the keys of what is kept."""
        settings = {k: v for k, v in vars(self.settings).items() if k not in _FITTING}
        schedulers = [
            (type(p.pipe).__name__, type(p.pipe.scheduler).__name__, dict(p.pipe.scheduler.config))
            for p in (self.source, self.target)
        ]
        return json.dumps([settings, schedulers], default=str)


def pair_pipelines(source: Pipeline, target: Pipeline, settings: Probing) -> PipelinePair:
    """Settles the size and learns how each model is told the prompts.

    Raises:
        UnsupportedFormat: predictions that do not turn into each other.
        ProLoRAError: latents of another number of channels.
    """
    names = source.name, target.name
    same = type(source.denoiser) is type(target.denoiser)
    schedules.check_schedules(source.schedule, target.schedule, same, names)
    channels = [p.channels for p in (source, target)]
    if channels[0] != channels[1]:
        raise ProLoRAError(
            f"{names[0]} denoises {channels[0]} channels and {names[1]} {channels[1]}: they cannot "
            "be asked the same question"
        )
    if settings.size is None:
        sizes = [p.size for p in (source, target)]
        known = [size for size in sizes if size is not None]
        settings = replace(settings, size=min(known) if known else None)
    ours, theirs = source.book(settings), target.book(settings)
    between = Translation(
        _CallTranslator(ours, theirs, source.schedule, target.schedule),
        _CallTranslator(theirs, ours, target.schedule, source.schedule),
        _PredictionConverter(source.denoiser, source.schedule, target.schedule),
        _PredictionReader(channels[0]),
    )
    return PipelinePair(source, target, settings, between)


@dataclass(frozen=True)
class _CallTranslator:
    """A call of one model -> the other's: same latents, as noisy, the prompt in its own words."""

    ours: PromptTable
    theirs: PromptTable
    schedule: Schedule
    their_schedule: Schedule

    def __call__(self, call: Call) -> Call:
        found = split_call(self.ours.model, call)
        prompts = [self.ours.prompt_of(found, i) for i in range(len(found.latent))]
        time = schedules.time_between(self.schedule, self.their_schedule, found.time)
        return self.theirs.call(found.latent, time, prompts)


@dataclass(frozen=True)
class _PredictionConverter:
    """A prediction of the source -> in the target's terms."""

    model: nn.Module
    ours: Schedule
    theirs: Schedule

    def __call__(self, call: Call, prediction: Tensor) -> Tensor:
        found = split_call(self.model, call)
        return schedules.convert_prediction(
            self.ours, self.theirs, found.latent, found.time, prediction
        )


@dataclass(frozen=True)
class _PredictionReader:
    """The prediction without the variance that some models (DiT, PixArt) learn beside it."""

    channels: int

    def __call__(self, result: Any) -> Tensor:
        found = output_of(result)
        return found[:, : self.channels] if found.dim() == 4 else found
