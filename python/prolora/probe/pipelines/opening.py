"""Loading diffusers pipeline folders."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...bases import vae
from ...bases.folder import MODELS, choose_candidate, open_folder_weights
from ...errors import UnsupportedFormat
from ...files.jsontext import read_json_object
from ..precision import HALVES
from .pipeline import Pipeline

# None of these runs when latents are asked for; a pipeline works without them.
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def open_pipeline(folder: Path, device: str | None = None) -> Pipeline:
    """Loads a diffusers pipeline folder, from safetensors only.

    The denoiser stays in the half precision it is stored in (see `precision`); the other models
    become float32.

    Args:
        folder: with model_index.json and a folder for each model.
        device: of all models; None means the CPU.

    Raises:
        UnsupportedFormat: it is not a pipeline folder, needs code that is not in diffusers or
            transformers, or has weights as pickles only; or diffusers (transformers, for text
            encoders) is missing or cannot load it.
    """
    index = _read_index(folder)
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
        with _hide_progress_bars(diffusers):
            denoiser = getattr(diffusers, index[part][1]).from_pretrained(
                folder / part, torch_dtype=_stored_dtype(folder / part), **options
            )
            unused = {name: None for name in _UNUSED if name in index}
            pipe = class_.from_pretrained(folder, **{part: denoiser}, **unused, **options)
    except ImportError as error:
        raise UnsupportedFormat(
            f'{folder}: a package is missing: {error}; pip install "prolora[probe]"'
        ) from error
    except Exception as error:  # its type depends on what is missing in the folder
        raise UnsupportedFormat(
            f"{folder}: diffusers cannot load this pipeline from safetensors: "
            f"{type(error).__name__}: {error}. Pickles are not read; save it again with "
            "pipe.save_pretrained(FOLDER, safe_serialization=True)"
        ) from error
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            model.eval()
            if model is not denoiser:
                model.float()  # a text encoder has the dtype in which it was saved
    return Pipeline(pipe.to(device or "cpu"), folder.name)


def _stored_dtype(folder: Path) -> torch.dtype:
    """The half precision in which all weights of a model are stored; float32 in other cases."""
    dtypes = {weight.dtype for weight in open_folder_weights(folder)[0].values()}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(HALVES) else torch.float32


@contextmanager
def _hide_progress_bars(diffusers: Any) -> Iterator[None]:
    """Hides the progress bars of the libraries, which would mix with that of prolora."""
    loggers = [diffusers.utils.logging]
    with suppress(ImportError):
        import transformers

        loggers.append(transformers.utils.logging)
    shown = [logging for logging in loggers if logging.is_progress_bar_enabled()]
    for logging in shown:
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch_dtype will have another name
            yield
    finally:
        for logging in shown:
            logging.enable_progress_bar()


def _read_index(folder: Path) -> dict[str, Any]:
    """Reads model_index.json; refuses a pipeline that would run code of other packages.

    Raises:
        UnsupportedFormat: see `open_pipeline`.
    """
    if not vae.is_pipeline(folder):
        raise UnsupportedFormat(
            f"{folder}: --method probe runs the models, so each base must be the folder of a whole "
            f"diffusers pipeline ({vae.PIPELINE_INDEX}, scheduler, text encoders, unet or "
            "transformer); weights alone cannot be sampled"
        )
    index = read_json_object(folder / vae.PIPELINE_INDEX)
    if not isinstance(index.get("_class_name"), str):
        raise UnsupportedFormat(f"{folder / vae.PIPELINE_INDEX}: names no class of diffusers")
    for name, value in index.items():
        if isinstance(value, list) and name not in _UNUSED and value[0] is not None:
            if value[0] not in ("diffusers", "transformers"):
                raise UnsupportedFormat(
                    f"{folder / vae.PIPELINE_INDEX}: {name} comes from {value[0]!r}, which is "
                    "code of its own; probing runs code of diffusers and transformers only"
                )
    if not any(isinstance(index.get(part), list) for part in MODELS):
        raise UnsupportedFormat(f"{folder}: the pipeline has no unet or transformer")
    return index
