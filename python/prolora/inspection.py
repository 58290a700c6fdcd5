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

from .adapters import algorithms, keys, names
from .adapters.family import guess_family
from .adapters.layout import Contents, lay_out
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
        algorithm: "lora", "locon" (with k×k convolutions), "tucker", "loha", "lokr", "full",
            "glora", "oft", with "+dora" behind where the result is rescaled, or the type that is
            not supported; the rarest where a file has several.
        algorithms: number of modules by algorithm.
        supported: whether prolora can transfer it (a LoRA) or knows its keys (a base).
        reason: why not.
        needs_base: the update depends on the weights of the base model (DoRA, GLoRA, OFT).
        family: guess of the base model: "sd15", "sdxl", "ssd-1b", …
        base_model: the base model that the metadata names.
        base_hash: its SHA-256 (or short hash) as the metadata gives it.
        modules: number of modules by place, {"unet": 722, …}; "not understood" for the others.
        types: number of modules by type, {"attn1.to_q": 70, …}.
        ranks: number of modules by rank.
        rank_min: lowest rank.
        rank_max: highest rank.
        alphas: number of modules by alpha; "none" for modules without.
        scales: place -> the factors (α/r or what PEFT's configuration asks for) in front of the
            updates there, and how many modules have each, {"unet": {"0.5": 722}}.
        left_out: number of tensors that are not moved, by reason.
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
    algorithms: dict[str, int] = field(default_factory=dict)
    supported: bool = False
    reason: str | None = None
    needs_base: bool = False
    family: str | None = None
    base_model: str | None = None
    base_hash: str | None = None
    modules: dict[str, int] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    rank_min: int | None = None
    rank_max: int | None = None
    alphas: dict[str, int] = field(default_factory=dict)
    scales: dict[str, dict[str, int]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
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
    """What the keys of a file give away, collected key by key; a damaged file gives some too.

    Attributes:
        modules: name -> what the path means; a fused weight goes by its own name.
        roles: name -> role -> key.
        forms: name -> what the shapes say, where they go together.
        refused: the type of each key that gives a type away that is not read.
        left_out: the reason for each tensor that is no part of an update.
        foreign: path -> rank of LoRA factors on modules that are not known.
    """

    modules: dict[str, names.Named] = field(default_factory=dict)
    roles: dict[str, dict[str, str]] = field(default_factory=dict)
    forms: dict[str, algorithms.Form] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    foreign: dict[str, int] = field(default_factory=dict)

    @property
    def canonical(self) -> list[str]:
        """All modules that are updated, parts of fused weights one by one."""
        return [name for module in self.modules.values() for name in module.modules]

    @property
    def inputs(self) -> dict[str, int]:
        """Input sizes where they show; other adapter types show names only."""
        inputs: dict[str, int] = {}
        for name, module in self.modules.items():
            size = _channels(self.forms[name]) if name in self.forms else 0
            # The original name of a FLUX weight tells its family, whatever its parts are called.
            original = (module.matrix.name,) if module.matrix else ()
            inputs |= dict.fromkeys((*module.modules, *original), size)
        return inputs


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
        "base_hash": _base_hash(source.metadata),
        "trigger_words": _trigger_words(source.metadata),
    }
    if found.roles or found.foreign or found.refused:
        return _describe_adapter(source, found, common)
    return _describe_other(source, common)


def _search(source: Source) -> _Found:
    """Sorts the keys of an adapter."""
    found = _Found()
    for key, header in source.headers.items():
        parsed = keys.parse(key)
        if isinstance(parsed, keys.LeftOut):
            found.left_out.append(parsed.reason)
        elif isinstance(parsed, keys.Refusal):
            found.refused.append(parsed.algorithm)
            module = names.parse(parsed.path)
            if module:
                found.modules.setdefault(module.name, module)
        elif parsed is None:
            factor = keys.split_factor(key)
            if factor is not None and factor[1] == "down" and header.shape:
                found.foreign[factor[0]] = header.shape[0]
        else:
            name = parsed.module.name
            found.modules.setdefault(name, parsed.module)
            found.roles.setdefault(name, {})[parsed.role] = key
    for name, roles in found.roles.items():
        shapes = {role: source.headers[key].shape for role, key in roles.items()}
        form = algorithms.form(shapes) if algorithms.missing(shapes.keys()) is None else None
        if form:
            found.forms[name] = form
    return found


def _channels(form: algorithms.Form) -> int:
    """Input channels, without the kernel."""
    return form.inputs // math.prod(form.kernel or (1,))


def _describe_adapter(source: Source, found: _Found, common: dict[str, Any]) -> Description:
    contents, reason = None, None
    try:
        contents = lay_out(source)
    except ProLoRAError as error:
        reason = str(error)
    ranks = [form.rank for form in found.forms.values() if form.rank] + [*found.foreign.values()]
    alphas = _alphas(source, found)
    first = next(iter(found.modules.values()), None)
    kinds = _kinds(found)
    return Description(
        kind="lora",
        format="peft" if source.config is not None else first and first.format,
        spelling="sgm" if any(m.sgm for m in found.modules.values()) else "diffusers",
        algorithm=next(reversed(kinds), None),
        algorithms=kinds,
        supported=reason is None,
        reason=reason,
        needs_base=any(algorithms.needs_base(roles.keys()) for roles in found.roles.values()),
        family=guess_family(found.inputs, source.metadata),
        modules=_count(
            [*map(names.place, found.canonical), *["not understood"] * len(found.foreign)],
        ),
        types=_count(_type(name) for name in found.canonical),
        ranks=dict(sorted(Counter(ranks).items())),
        rank_min=min(ranks, default=None),
        rank_max=max(ranks, default=None),
        alphas=_count(f"{alphas[n]:g}" if n in alphas else "none" for n in found.modules),
        scales=_scales(contents, alphas) if contents else {},
        left_out=_count(contents.left_out.values() if contents else found.left_out),
        **common,
    )


def _alphas(source: Source, found: _Found) -> dict[str, float]:
    """Module -> alpha; the only tensors that are read, a number each."""
    alphas = {}
    for name, roles in found.roles.items():
        key = roles.get("alpha")
        if key is not None and math.prod(source.headers[key].shape) == 1:
            alphas[name] = source.read(key).double().item()
    return alphas


def _scales(contents: Contents, alphas: dict[str, float]) -> dict[str, dict[str, int]]:
    """Place -> scale -> number of updates."""
    by_place: dict[str, list[str]] = {}
    for slot in contents.slots:
        scale = 1.0
        if slot.peft is not None:
            scale = slot.peft.scale(slot.module.local)
        elif slot.form.rank and slot.module.name in alphas:
            scale = alphas[slot.module.name] / slot.form.rank
        by_place.setdefault(names.place(slot.module.name), []).append(f"{scale:.4g}")
    return {place: _count(scales) for place, scales in by_place.items()}


def _kinds(found: _Found) -> dict[str, int]:
    """Number of modules by algorithm, most frequent first."""
    kinds = list(found.refused)
    for name, roles in found.roles.items():
        form = found.forms.get(name)
        kind = form.algorithm if form else algorithms.family_of(roles.keys())
        dora = {"dora_scale", "magnitude"} & roles.keys()
        kinds.append(kind + ("+dora" if dora else ""))
    return _count(kinds or ["lora"] * len(found.foreign))


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
        module = names.parse(path.removeprefix(_LDM_PREFIX))
        original = ldm_to_diffusers(path.removeprefix(_LDM_PREFIX))
        is_original = original is not None or (module is not None and module.sgm)
        single_file = single_file or is_original or key.startswith(_LDM_PREFIX)
        found = module.modules if module else (original,)
        inputs |= {name: header.shape[1] for name in found if name is not None}
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


def _base_hash(metadata: dict[str, str]) -> str | None:
    """The hash of the base model's file, the full one where there is one."""
    fields = ("ss_new_sd_model_hash", "ss_sd_model_hash")
    return next((metadata[f] for f in fields if metadata.get(f)), None)


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
