"""What a file is, from its header and a few numbers: `prolora inspect`."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .adapters import keys, names
from .adapters.family import guess_family
from .adapters.layout import lay_out
from .adapters.source import ADAPTER_FILES, Source, open_source
from .bases import Base, open_base
from .errors import ProLoRAError
from .sgm import ldm_to_diffusers

_TOP_TAGS = 10
# Everything up to the number of the innermost block.
_BLOCKS = re.compile(
    r"^(?:.*\.)?"
    r"(?:(?:single_)?transformer_blocks|layers|attentions|resnets|(?:down|up)_blocks)\.\d+\."
)
_LDM_PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class Description:
    """What `inspect` found out.

    Attributes:
        path: the file or folder.
        kind: "lora", "base" (a checkpoint) or "unknown".
        format: "kohya", "diffusers", "peft" or "comfy" for a LoRA, "single-file" or "diffusers"
            for a base.
        spelling: "diffusers" or "sgm" module names.
        algorithm: "lora", "locon" (with k×k convolutions), or the type that is not supported.
        supported: whether prolora can transfer it (a LoRA) or knows its keys (a base).
        reason: why not.
        family: guess of the base model: "sd15", "sdxl", "ssd-1b", …
        base_model: the base model that the metadata names.
        modules: number of modules by place, {"unet": 722, …}; "not understood" for the others.
        types: number of modules by type, {"attn1.to_q": 70, …}.
        ranks: number of modules by rank.
        rank_min: lowest rank.
        rank_max: highest rank.
        alphas: number of modules by alpha; "none" for modules without.
        dtypes: number of tensors by storage dtype.
        tensors: number of tensors.
        size: bytes of the weight file.
        trigger_words: the most frequent training tags, most frequent first.
    """

    path: str
    kind: str
    format: str | None = None
    spelling: str | None = None
    algorithm: str | None = None
    supported: bool = False
    reason: str | None = None
    family: str | None = None
    base_model: str | None = None
    modules: dict[str, int] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    rank_min: int | None = None
    rank_max: int | None = None
    alphas: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    tensors: int = 0
    size: int = 0
    trigger_words: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON (whose objects have text as keys)."""
        table = asdict(self)
        table["ranks"] = {str(rank): count for rank, count in self.ranks.items()}
        return table


@dataclass
class _Found:
    """What the keys of a file give away, collected key by key."""

    modules: dict[str, names.Named] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alpha_keys: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    foreign: int = 0


def inspect(path: str | os.PathLike[str]) -> Description:
    """Says what a file or folder is; reads headers and the alphas, never a weight.

    Adapter types that prolora does not transfer are described all the same, with the reason.

    Args:
        path: a .safetensors file, a folder with an adapter, or a diffusers folder of a base.

    Raises:
        UnsupportedFormat: not a safetensors file, or a damaged one.
    """
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in ADAPTER_FILES):
        return _describe_base(open_base(path), str(path))
    source = open_source(path)
    found = _search(source)
    common: dict[str, Any] = {
        "path": str(path),
        "dtypes": _count(str(h.dtype).removeprefix("torch.") for h in source.headers.values()),
        "tensors": len(source.headers),
        "size": source.path.stat().st_size if source.path else 0,
        "base_model": _base_model(source.metadata),
        "trigger_words": _trigger_words(source.metadata),
    }
    if found.ranks or found.refused:
        return _describe_adapter(source, found, common)
    return _describe_other(source, common)


def _search(source: Source) -> _Found:
    """Sorts the keys of an adapter."""
    found = _Found()
    for key, header in source.headers.items():
        parsed = keys.parse(key)
        if isinstance(parsed, keys.Refusal):
            found.refused.append(parsed.algorithm)
            module = names.parse(parsed.path)
            if module:
                found.modules.setdefault(module.name, module)
        elif parsed is None:
            factor = keys.split_factor(key)
            if factor is not None and factor[1] == "down" and header.shape:
                found.ranks[factor[0]] = header.shape[0]
                found.foreign += 1
        else:
            name = parsed.module.name
            found.modules.setdefault(name, parsed.module)
            if parsed.role == "alpha":
                if math.prod(header.shape) == 1:
                    found.alpha_keys[name] = key
            elif parsed.role == "down" and len(header.shape) >= 2:
                found.ranks[name] = header.shape[0]
                found.inputs[name] = header.shape[1]
                found.kernels[name] = math.prod(header.shape[2:])
    return found


def _describe_adapter(source: Source, found: _Found, common: dict[str, Any]) -> Description:
    reason = None
    try:
        lay_out(source)
    except ProLoRAError as error:
        reason = str(error)
    alphas = {name: source.read(key).double().item() for name, key in found.alpha_keys.items()}
    first = next(iter(found.modules.values()), None)
    family = first and first.format
    return Description(
        kind="lora",
        format="peft" if source.config is not None else family,
        spelling="sgm" if any(m.sgm for m in found.modules.values()) else "diffusers",
        algorithm=_algorithm(found),
        supported=reason is None,
        reason=reason,
        family=guess_family(_all_inputs(found), source.metadata),
        modules=_count(
            [*map(names.place, found.modules), *["not understood"] * found.foreign],
        ),
        types=_count(_type(name) for name in found.modules),
        ranks=dict(sorted(Counter(found.ranks.values()).items())),
        rank_min=min(found.ranks.values(), default=None),
        rank_max=max(found.ranks.values(), default=None),
        alphas=_count(f"{alphas[n]:g}" if n in alphas else "none" for n in found.modules),
        **common,
    )


def _all_inputs(found: _Found) -> dict[str, int]:
    """Input sizes where they show; other adapter types show names only."""
    return {name: found.inputs.get(name, 0) for name in found.modules}


def _algorithm(found: _Found) -> str:
    if found.refused:
        return Counter(found.refused).most_common(1)[0][0]
    return "locon" if any(size > 1 for size in found.kernels.values()) else "lora"


def _type(name: str) -> str:
    """What a module does, without where it is: `attn1.to_q`, `ff.net.2`, `mlp.fc1`, `conv1`."""
    return _BLOCKS.sub("", names.local_name(name)) or name


def _describe_other(source: Source, common: dict[str, Any]) -> Description:
    """A base checkpoint, or something else altogether."""
    inputs: dict[str, int] = {}
    single_file = False
    for key, header in source.headers.items():
        path = key.removesuffix(".weight")
        if path == key or len(header.shape) < 2:
            continue
        if key.startswith(_LDM_PREFIX):
            single_file = True
            name = ldm_to_diffusers(path.removeprefix(_LDM_PREFIX))
        else:
            module = names.parse(path)
            name = module.name if module else ldm_to_diffusers(path)
            single_file = single_file or (name is not None and module is None)
        if name is not None:
            inputs[name] = header.shape[1]
    is_base = bool(inputs) or any(keys.is_base_weight(key) for key in source.headers)
    if not is_base:
        return Description(kind="unknown", reason=_unknown_reason(source), **common)
    return Description(
        kind="base",
        format="single-file" if single_file else "diffusers",
        spelling="sgm" if single_file else "diffusers",
        supported=bool(inputs),
        reason=None if inputs else "its weights have names that prolora does not know",
        family=guess_family(inputs, source.metadata),
        modules=_count(names.place(name) for name in inputs),
        types=_count(_type(name) for name in inputs),
        **common,
    )


def _describe_base(base: Base, path: str) -> Description:
    """A base model that `transfer` would open the same way."""
    inputs = {name: shape[1] for name, shape in base.shapes.items()}
    return Description(
        path=path,
        kind="base",
        format="diffusers",
        spelling="diffusers",
        supported=True,
        family=base.layout or guess_family(inputs, {}),
        modules=_count(names.place(name) for name in inputs),
        types=_count(_type(name) for name in inputs),
        dtypes=_count(str(dtype).removeprefix("torch.") for dtype in base.dtypes.values()),
        tensors=len(inputs),
        size=sum(file.stat().st_size for file in base.files),
    )


def _unknown_reason(source: Source) -> str:
    if not source.headers:
        return "it holds no tensors"
    return (
        f"its keys are neither a LoRA's nor a base model's: {', '.join(list(source.headers)[:3])}"
    )


def _count(values: Iterable[str]) -> dict[str, int]:
    """Value -> number of times, most frequent first."""
    return dict(Counter(values).most_common())


def _base_model(metadata: dict[str, str]) -> str | None:
    """The base model by name or version, as far as the metadata tells."""
    fields = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
    return next((Path(metadata[f]).name for f in fields if metadata.get(f)), None)


def _trigger_words(metadata: dict[str, str]) -> list[str]:
    """The trigger phrase if there is one, then the most frequent tags of the training set."""
    words = [metadata["modelspec.trigger_phrase"]] if "modelspec.trigger_phrase" in metadata else []
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
    except (ValueError, RecursionError):
        return words
    counts: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int):
                counts[tag.strip()] += count
    return words + [tag for tag, _ in counts.most_common(_TOP_TAGS) if tag not in words]
