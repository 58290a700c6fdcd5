"""Opening diffusers pipeline folders: one, and both of a fit."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...bases import open_base
from ...bases.folder import choose_candidate, open_folder_weights
from ...bases.pipeline_files import (
    PIPELINE_INDEX,
    UNUSED_PARTS,
    draws_in_few_steps,
    read_component_config,
    read_pipeline_index,
)
from ...core.validation import DeviceLike
from ...errors import UnsupportedFormat
from ...files.untrusted import load_pretrained
from ..fit_plan import FitJob, LoraParts
from ..models import HALVES, check_weights
from ..settings import FitSettings
from .memory_bounds import check_memory
from .pipeline import Pipeline, run_text_encoders_beside
from .prompt_memory import PromptMemory


def open_pipeline(folder: Path, device: DeviceLike = None) -> Pipeline:
    """Loads a diffusers pipeline folder, from safetensors only.

    The denoiser stays in the half precision it is stored in (see `precision`); the other models
    become float32. A device of None leaves all models on the CPU.
    """
    index = read_pipeline_index(folder)
    for name, (library, _) in index.parts.items():
        if library not in ("diffusers", "transformers") and name not in UNUSED_PARTS:
            raise UnsupportedFormat(
                f"{folder / PIPELINE_INDEX}: {name} comes from {library!r}, which is code of its "
                "own; only code of diffusers and transformers is run"
            )
    if index.denoiser is None:
        raise UnsupportedFormat(f"{folder}: the pipeline has no unet or transformer")
    try:
        import diffusers
    except ImportError as error:
        raise UnsupportedFormat(
            f"the models run through diffusers, which cannot be imported ({error}): "
            "pip install -U diffusers transformers accelerate"
        ) from error
    part, parts = index.denoiser, index.parts
    if index.class_name == "IconPipeline":  # of the shipped family
        class_: Any = _import_icon_pipeline()
    else:
        class_ = _find_class(diffusers, index.class_name, "DiffusionPipeline", folder)
    model_class = _find_class(diffusers, parts[part][1], "ModelMixin", folder)
    for name in {part, "vae"} & parts.keys():
        read_component_config(folder / name)
    best = choose_candidate(file.name for file in (folder / part).glob("*"))
    options = {"variant": best.variant} if best is not None and best.variant else {}
    try:
        with hide_progress_bars():
            dtype = _stored_dtype(folder / part)
            denoiser = load_pretrained(model_class, folder / part, torch_dtype=dtype, **options)
            unused = {name: None for name in UNUSED_PARTS if name in index.content}
            pipe = load_pretrained(class_, folder, **{part: denoiser}, **unused, **options)
    except ImportError as error:
        raise UnsupportedFormat(
            f"{folder}: {error}; pip install diffusers transformers accelerate"
        ) from error
    except Exception as error:  # its type depends on what is missing in the folder
        raise UnsupportedFormat(
            f"{folder}: diffusers cannot load this pipeline from safetensors: "
            f"{type(error).__name__}: {error}. Pickles are not read; save it again with "
            "pipe.save_pretrained(FOLDER, safe_serialization=True)"
        ) from error
    memory = PromptMemory(pipe)
    for way in ("enable_slicing", "enable_tiling"):  # of batches and large images, if it can
        with suppress(AttributeError, NotImplementedError):
            getattr(pipe.vae, way)()
    for name, model in pipe.components.items():
        if isinstance(model, nn.Module):
            check_weights(model, str(folder / name))
            model.eval()
            if model is not denoiser:
                model.float()  # a text encoder has the dtype in which it was saved
            if device is not None:
                model.to(device)  # pipe.to warns of halves on a CPU, which are widened here
    pipeline = Pipeline(pipe, folder.name, memory)
    pipeline.few_steps = bool(draws_in_few_steps(open_base(folder)))
    return pipeline


@contextmanager
def open_both(
    job: FitJob, lora: LoraParts, settings: FitSettings
) -> Iterator[tuple[Pipeline, Pipeline]]:
    """Opens source and target, and frees their memory at the end.

    They encode the prompts in turn: the first's text encoders make room. The LoRA's part in text
    encoders that both have runs in both within the block.
    """
    card, device = job.card, job.options.device
    if job.options.memory_limit is not None:
        check_memory(job.options.memory_limit, job.folders, device)
    models = list[Pipeline]()
    with ExitStack() as stack:
        for number, folder in enumerate(job.folders):
            # Text encoders of a pipeline on a bounded card run in the machine's memory.
            model = open_pipeline(folder, None if card else device)
            stack.callback(model.free)
            stack.enter_context(run_text_encoders_beside(model, lora.carried))
            if number == 0:
                with run_text_encoders_beside(model, lora.text):
                    model.encode_prompts(settings)
                model.encode_prompts(settings)
            else:
                model.encode_prompts(model.derive_target_settings(settings))
            assert model.memory is not None
            model.memory.release()
            if card is not None:
                model.move_to_card(str(device), card.rooms[number], card.tile)
            models.append(model)
        yield models[0], models[1]


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hides the libraries' progress bars, which would mix with prolora's, and logs as it does."""
    import diffusers

    loggers: list[Any] = [diffusers.utils.logging]
    with suppress(ImportError):
        import transformers

        loggers.append(transformers.utils.logging)
    shown = [logging for logging in loggers if logging.is_progress_bar_enabled()]
    for logging in shown:
        logging.disable_progress_bar()
    for logging in loggers:  # their own handlers write what a file says with control characters
        logging.disable_default_handler()
        logging.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch_dtype will have another name
            yield
    finally:
        for logging in loggers:
            logging.enable_default_handler()
            logging.disable_propagation()
        for logging in shown:
            logging.enable_progress_bar()


def _import_icon_pipeline() -> Any:
    try:
        return importlib.import_module("prolora_icon_family").IconPipeline
    except ImportError as error:
        raise UnsupportedFormat(
            f"IconPipeline comes with prolora's icon models: {error}; install them from a clone of "
            "its repository: pip install ./examples/icon_family"
        ) from error


def _stored_dtype(folder: Path) -> torch.dtype:
    """Returns the half precision of all weights of a model, else float32."""
    dtypes = {weight.dtype for weight in open_folder_weights(folder).values()}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(HALVES) else torch.float32


def _find_class(diffusers: Any, name: str, kind: str, folder: Path) -> Any:
    """Finds a class of diffusers by name; it must be derived from `kind`."""
    found = getattr(diffusers, name, None)
    if not isinstance(found, type) or not issubclass(found, getattr(diffusers, kind)):
        raise UnsupportedFormat(
            f"{folder}: diffusers {diffusers.__version__} has no {kind} called {name}; "
            "pip install -U diffusers"
        )
    return found
