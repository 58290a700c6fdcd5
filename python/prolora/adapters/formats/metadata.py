"""Header metadata of LoRA files, and what a transfer changes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from ...architectures.identify import NUM_BLOCKS, count_main_blocks
from ...errors import UnsupportedFormat
from ...files.jsontext import parse_json_object
from ..trigger_words import combine_tags
from .moves import PREFIX
from .peft_config import METADATA_KEY

SPECIFICATION = "1.0.1"
"""The version of `modelspec.*` whose keys these are (Stability-AI/ModelSpec)."""


class ModelIds(NamedTuple):
    """The ids of a model; None where no trainer was found to write one."""

    version: str | None = None  # kohya's `ss_base_model_version`
    architecture: str | None = None  # `modelspec.architecture`, without the "/lora" of an adapter


_SD1 = ModelIds("sd_v1", "stable-diffusion-v1")
# SSD-1B, Vega and KOALA have no id of their own; user interfaces list their LoRAs with SDXL's.
_SDXL = ModelIds("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")
_FLUX_DEV = ModelIds("flux1", "flux-1-dev")
_HUNYUAN_VIDEO = ModelIds("hunyuan_video", "hunyuan-video")
_HUNYUAN_VIDEO_15 = ModelIds("hunyuan_video_1_5", "hunyuan-video-1.5")
_KANDINSKY = ModelIds("kandinsky5", "Kandinsky-5")
# Layout -> ids, as sd-scripts writes them (library/sai_model_spec.py), or musubi-tuner
# (utils/sai_model_spec.py, dataset/architectures.py) for videos and what it alone trains.
_LAYOUTS = {
    "sd15": _SD1,
    "sd21": ModelIds("sd_v2", "stable-diffusion-v2-512"),
    "sdxl": _SDXL,
    "ssd-1b": _SDXL,
    "segmind-vega": _SDXL,
    "sd3-medium": ModelIds(None, "stable-diffusion-3-m"),
    "sd3.5-medium": ModelIds(None, "stable-diffusion-3-5-medium"),
    "sd3.5-large": ModelIds(None, "stable-diffusion-3-5-large"),
    "flux1-dev": _FLUX_DEV,
    "flux1-fill": _FLUX_DEV,
    "flux1-schnell": ModelIds("flux1", "flux-1-schnell"),
    "flux2-dev": ModelIds("flux_2_dev", "Flux.2-dev"),
    "flux2-klein-4b": ModelIds("flux_2_klein_4b", "Flux.2-klein-4b"),
    "flux2-klein-9b": ModelIds("flux_2_klein_9b", "Flux.2-klein-9b"),
    "chroma": ModelIds(None, "chroma"),
    "lumina2": ModelIds(None, "lumina-2"),
    "hunyuan-image": ModelIds(None, "hunyuan-image-2.1"),
    "hunyuan-image-distilled": ModelIds(None, "hunyuan-image-2.1"),
    "hunyuan-video": _HUNYUAN_VIDEO,
    "hunyuan-video-i2v-33": _HUNYUAN_VIDEO,
    "framepack": ModelIds("framepack", "framepack"),
    "hunyuan-video-1.5": _HUNYUAN_VIDEO_15,
    "hunyuan-video-1.5-step-distilled": _HUNYUAN_VIDEO_15,
    "kandinsky5-lite": _KANDINSKY,
    "kandinsky5-pro": _KANDINSKY,
    "qwen-image": ModelIds("qwen_image", "Qwen-Image"),
    "z-image": ModelIds("z_image", "Z-Image"),
    "krea2": ModelIds("krea2"),
    "ideogram4": ModelIds("ideogram4"),
    "minimax-h3": ModelIds("minimax_h3"),
}
# Beginning of a layout's id -> ids of all its sizes.
_SIZES = {
    "bk-sdm-": _SD1,
    "koala-": _SDXL,
    "anima": ModelIds(None, "anima-preview"),
    "wan": ModelIds("wan", "wan2.1"),
}

_LISTED = ("modelspec.trigger_phrase", "modelspec.tags", "modelspec.author")
_STATED_BASE = (f"{PREFIX}target", f"{PREFIX}target_hash")

# True only of the file they were written into.
_OF_THE_FILE = (
    "sshs_model_hash",
    "sshs_legacy_hash",
    "modelspec.hash_sha256",
    METADATA_KEY,
)


def rewrite_metadata(
    metadata: Mapping[str, str],
    *,
    target_name: str,
    target_layout: str | None,
    target_short_hash: str | None = None,
    provenance: Mapping[str, str],
) -> dict[str, str]:
    """Returns the metadata of a LoRA after its move to another base model.

    Trigger words, tags and training parameters are kept. What names the old base model is replaced,
    or removed where the new value is not known; what describes the old file is removed.

    Args:
        metadata: of the source LoRA.
        target_name: name of the target base model.
        target_layout: its architecture (an id of `architectures.layouts`), None if unknown.
        target_short_hash: kohya's eight digits of it.
        provenance: facts of the transfer, written as `prolora.<key>`.
    """
    entries = {
        key: value
        for key, value in metadata.items()
        if key not in _OF_THE_FILE and not key.startswith("prolora.")
    }
    version, architecture = find_ids(target_layout)
    _replace_entry(entries, "ss_base_model_version", version)
    _describe_architecture(entries, architecture and f"{architecture}/lora")
    _replace_entry(entries, "ss_v2", None if version is None else str(version.startswith("sd_v2")))
    entries["ss_sd_model_name"] = target_name
    _state_blocks(entries, target_layout)
    _replace_entry(entries, "ss_sd_model_hash", target_short_hash)
    # The digest of a whole base, which nothing here reads.
    entries.pop("ss_new_sd_model_hash", None)

    lora = metadata.get("ss_output_name") or metadata.get("modelspec.title") or "LoRA"
    entries["modelspec.merged_from"] = f"{lora}, {target_name}"
    entries.setdefault("modelspec.title", lora)
    source = provenance.get("source", metadata.get("ss_sd_model_name", "another base model"))
    comment = f"moved from {source} to {target_name} by prolora"
    old = metadata.get("ss_training_comment", "")
    entries["ss_training_comment"] = f"{old}; {comment}" if old not in ("", "None") else comment
    entries.update({f"prolora.{key.removeprefix('prolora.')}": v for key, v in provenance.items()})
    return entries


def combine_metadata(headers: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Combines the headers (name of a LoRA -> metadata) of merged LoRAs.

    Entries that all have are kept, of earlier moves the base alone. Trigger words, tags and authors
    of all are listed.
    """
    first, *others = headers.values()
    combined = {
        key: value
        for key, value in first.items()
        if key not in _OF_THE_FILE
        and (not key.startswith(PREFIX) or key in _STATED_BASE)
        and all(other.get(key) == value for other in others)
    }
    for key in _LISTED:
        texts = (header.get(key, "").strip() for header in headers.values())
        if listed := ", ".join(dict.fromkeys(text for text in texts if text)):
            combined[key] = listed
    if tags := combine_tags(headers):
        combined["ss_tag_frequency"] = tags
    combined["modelspec.title"] = " + ".join(headers)
    combined["modelspec.merged_from"] = ", ".join(headers)
    combined["ss_training_comment"] = f"merged of {', '.join(headers)} by prolora"
    return combined


def _state_blocks(metadata: dict[str, str], layout: str | None) -> None:
    """States the number of blocks of the new base, where the old header or Anima's trainers do."""
    try:
        arguments = parse_json_object(metadata.get("ss_network_args", "{}"), "ss_network_args")
    except UnsupportedFormat:
        return
    if NUM_BLOCKS in arguments or (layout or "").startswith("anima"):
        arguments.pop(NUM_BLOCKS, None)
        if layout is not None:
            arguments[NUM_BLOCKS] = count_main_blocks(layout)
        metadata["ss_network_args"] = json.dumps(arguments)


def _describe_architecture(metadata: dict[str, str], architecture: str | None) -> None:
    """Sets or removes the entry by which managers sort, and its dependants.

    No date is added: the same call writes the same bytes. A date of the LoRA stays.
    """
    if architecture != metadata.get("modelspec.architecture"):
        metadata.pop("modelspec.prediction_type", None)
    _replace_entry(metadata, "modelspec.architecture", architecture)
    if architecture is not None:
        metadata.setdefault("modelspec.sai_model_spec", SPECIFICATION)


def _replace_entry(metadata: dict[str, str], key: str, value: str | None) -> None:
    """Sets an entry, or removes it if its new value is not known."""
    metadata.pop(key, None)
    if value is not None:
        metadata[key] = value


def clean_metadata(
    metadata: Mapping[str, str], format: str, ranks: set[int] | None
) -> dict[str, str]:
    """Returns the metadata of a new file, without what described only the old one.

    `ranks` are all ranks in it; None where it holds the old tensors, as the header tells of them.
    """
    entries = {key: value for key, value in metadata.items() if key not in _OF_THE_FILE}
    if ranks is not None:
        _describe_ranks(entries, format, ranks)
    if format in ("diffusers", "peft"):
        entries["format"] = "pt"  # transformers refuses a file without it
    return entries


def _describe_ranks(metadata: dict[str, str], format: str, ranks: set[int]) -> None:
    if format == "kohya":
        is_flux = metadata.get("ss_base_model_version", "").startswith("flux1")
        network = "networks.lora_flux" if is_flux else "networks.lora"
        metadata.setdefault("ss_network_module", network)
    if metadata.get("ss_network_module", "").startswith("lycoris"):
        # A plain LoRA is written, whatever the original was.
        metadata["ss_network_module"] = "networks.lora"
        metadata.pop("ss_network_args", None)
    if format == "kohya" or "ss_network_dim" in metadata:
        dim = str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic"
        metadata["ss_network_dim"] = metadata["ss_network_alpha"] = dim


def find_ids(layout: str | None) -> ModelIds:
    """Returns the ids of a layout (an id of `architectures.layouts`), None if unknown."""
    if layout is None:
        return ModelIds()
    of_sizes = (ids for start, ids in _SIZES.items() if layout.startswith(start))
    return _LAYOUTS.get(layout) or next(of_sizes, ModelIds())
