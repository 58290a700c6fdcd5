"""What a file is, from its header and a few numbers."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..adapters.family import (
    claimed_family,
    claimed_version,
    guess_families,
    guess_family,
    guess_sizes,
    known_base,
)
from ..adapters.folder import ADAPTER_FILES
from ..adapters.formats.moves import Move, read_moves
from ..adapters.formats.programs import Readers, find_readers
from ..adapters.keys import module_names, tensor_keys
from ..adapters.lora import Lora
from ..adapters.naming import most_common_spelling
from ..adapters.overview import (
    NOT_UNDERSTOOD,
    ComponentOverview,
    Overview,
    count_values,
    survey_keys,
)
from ..adapters.training_words import read_training_words
from ..architectures.modules import find_block, find_component, local_name
from ..bases import Base, open_base
from ..bases.folder import find_expert_folders
from ..errors import ProLoRAError
from ..files.dtypes import spell_dtype
from .base_check import is_language_model

_TOP_TAGS = 10
# Everything up to the number of the innermost block.
_BLOCKS = re.compile(
    r"^(?:.*\.)?"
    r"(?:(?:single_)?transformer_blocks|layers|attentions|resnets|block|(?:down|up)_blocks)\.\d+\."
)
_LDM_PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class Description:
    """What a file or folder is.

    Attributes:
        path: the file or folder.
        kind: "lora", "base" (a checkpoint) or "unknown".
        format: "kohya", "diffusers", "peft" or "comfy" for a LoRA, "single-file" or "diffusers"
            for a base.
        spelling: "diffusers" or "sgm" module names.
        algorithm: "lora", "locon" (with k×k convolutions), "tucker", "loha", "lokr", "full",
            "glora" or "oft", with "+dora" behind it where the result is rescaled; "norm" for a file
            of normalisation layers alone; or a type that is not supported. The rarest where a file
            has several.
        algorithms: number of modules by algorithm.
        supported: whether prolora can transfer it (a LoRA; one without `families` goes
            wherever two bases have its modules) or knows its keys (a base).
        reason: why it is not supported.
        needs_base: the update depends on the weights of the base model (DoRA, GLoRA, OFT).
        family: guess of the base model ("sd15", "sdxl", "ssd-1b", …), by names and shapes, and by
            the metadata where those say nothing.
        families: all that it can be, where several families have its modules in its sizes.
        sizes: ids of the published sizes (`architectures.layouts`) that a transformer's LoRA fits.
        version_claimed: what the metadata calls the model within its family.
        readers: programs that read all of a LoRA, as far as they were tried.
        part_readers: programs that read some of its modules.
        non_readers: programs that have models of its family and read nothing of it.
        untried_readers: of those that read it, the ones not tried with its text encoders.
        family_claimed: the family by the metadata: that of the base model with this hash where the
            hash is a known one, else by version or architecture.
        base_model: the base model that the metadata names, or the known one with this hash.
        base_hash: its SHA-256 (or short hash) as the metadata gives it.
        experts: the folders of a base's two experts, the one for high noise first; what is said of
            the base is said of that one.
        moves: what prolora did to the LoRA before: from which base to which, oldest first.
        modules: number of modules by place, {"unet": 722, …}; "not understood" for the others.
        types: number of modules by type, {"attn1.to_q": 70, …}.
        ranks: number of modules by rank.
        rank_min: lowest rank.
        rank_max: highest rank.
        alphas: number of modules by alpha; "none" for modules without.
        places: part of the pipeline -> algorithms, ranks, alphas and scales (α/r, or what PEFT's
            configuration asks for) of its updates.
        vectors: number of trained biases ("bias") and of weights of normalisation layers ("norm").
        left_out: number of tensors that are not moved, by reason.
        dtypes: number of tensors by storage dtype.
        tensors: number of tensors.
        quantised: how a base's weights are quantised, and how many; "" where none is.
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
    families: list[str] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    version_claimed: str | None = None
    readers: list[str] = field(default_factory=list)
    part_readers: list[str] = field(default_factory=list)
    non_readers: list[str] = field(default_factory=list)
    untried_readers: list[str] = field(default_factory=list)
    family_claimed: str | None = None
    base_model: str | None = None
    base_hash: str | None = None
    experts: tuple[str, ...] = ()
    moves: tuple[Move, ...] = ()
    modules: dict[str, int] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    rank_min: int | None = None
    rank_max: int | None = None
    alphas: dict[str, int] = field(default_factory=dict)
    places: dict[str, ComponentOverview] = field(default_factory=dict)
    vectors: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    tensors: int = 0
    size: int = 0
    quantised: str = ""
    trigger_words: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON (whose objects have text as keys)."""
        table = asdict(self)
        for part in (table, *table["places"].values()):
            part["ranks"] = {str(rank): number for rank, number in part["ranks"].items()}
        return table


def inspect(path: str | os.PathLike[str]) -> Description:
    """Says what a file or folder is; reads headers and the alphas, never a weight.

    Adapter types that prolora does not transfer are described all the same, with the reason.

    Args:
        path: a .safetensors file, a folder with an adapter, an id of one on the hub, or a diffusers
            folder of a base.

    Raises:
        UnsupportedFormat: not a safetensors file, or a damaged one.
    """
    if experts := find_expert_folders(Path(path)):
        described = _describe_base(open_base(experts[0]), str(path), "diffusers")
        return replace(described, experts=tuple(folder.name for folder in experts))
    folder = Path(path).is_dir() and not any((Path(path) / n).exists() for n in ADAPTER_FILES)
    ending = Path(path).suffix.lower()
    if folder or ending in (".gguf", ".onnx"):
        return _describe_base(open_base(path), str(path), "diffusers" if folder else ending[1:])
    opened = Lora.open(path)
    overview = survey_keys(opened)
    common: dict[str, Any] = {
        "path": str(path),
        "dtypes": count_values(spell_dtype(h.dtype) for h in opened.headers.values()),
        "tensors": len(opened.headers),
        "size": opened.path.stat().st_size if opened.path else 0,
        "family_claimed": claimed_family(opened.metadata),
        "version_claimed": claimed_version(opened.metadata),
        "base_model": _base_model(opened.metadata),
        "base_hash": _base_hash(opened.metadata),
        "moves": read_moves(opened.metadata),
        "trigger_words": _trigger_words(opened.metadata),
    }
    # nunchaku calls the low-rank part of a base's quantised weight as a LoRA's factors.
    holds_codes = any(key.endswith(".qweight") for key in opened.headers)
    if overview.is_adapter and not holds_codes:
        return _describe_adapter(opened, overview, common)
    return _describe_other(opened, common)


def _describe_adapter(opened: Lora, overview: Overview, common: dict[str, Any]) -> Description:
    kinds, ranks = overview.algorithms, overview.ranks
    first = next(iter(overview.modules.values()), None) or next(
        (module for module, _ in overview.vectors), None
    )
    vectors = Counter("bias" if tensor == "bias" else "norm" for _, tensor in overview.vectors)
    vector_modules = {name for module, _ in overview.vectors for name in module.modules}
    shapes = overview.shapes
    shapes |= dict.fromkeys(vector_modules - shapes.keys(), (0, 0))
    spelling = most_common_spelling(overview.modules.values())
    families = guess_families(shapes, opened.metadata, spelling, overview.matrices)
    reason = overview.reason
    if not (reason or families) and is_language_model(overview.canonical):
        reason = "it is a language model's, and prolora takes diffusion models alone"
    places = overview.components()
    alphas: Counter[str] = Counter()
    for place in places.values():
        alphas.update(place.alphas)
    format = "peft" if opened.config is not None else first and first.format
    # What programs do with other kinds was not tried.
    tried = not set(kinds) - {"lora", "locon"}
    readers = find_readers(families, format or "", spelling, shapes) if tried else Readers()
    return Description(
        kind="lora",
        format=format,
        spelling="sgm" if any(m.sgm for m in overview.modules.values()) else "diffusers",
        algorithm=next(reversed(kinds), None),
        algorithms=kinds,
        supported=reason is None,
        reason=reason,
        needs_base=overview.needs_base,
        family=families[0] if len(families) == 1 else None,
        families=list(families),
        sizes=list(guess_sizes(shapes)),
        readers=list(readers.whole),
        part_readers=list(readers.part),
        non_readers=list(readers.none),
        untried_readers=list(readers.untried),
        modules=count_values(
            [*map(find_component, overview.canonical), *[NOT_UNDERSTOOD] * len(overview.foreign)],
        ),
        types=count_values(_layer_type(name) for name in overview.canonical),
        places=places,
        ranks=dict(sorted(Counter(ranks).items())),
        rank_min=min(ranks, default=None),
        rank_max=max(ranks, default=None),
        alphas=dict(alphas.most_common()),
        vectors=dict(vectors),
        left_out=count_values(
            overview.contents.left_out.values() if overview.contents else overview.left_out
        ),
        **common,
    )


def _layer_type(name: str) -> str:
    """What a module does, without where it is: `attn1.to_q`, `ff.net.2`, `mlp.fc1`, `conv1`."""
    block = find_block(name)
    if block is not None:
        return block.local
    return _BLOCKS.sub("", local_name(name)) or name


def _describe_other(source: Lora, common: dict[str, Any]) -> Description:
    """A base checkpoint, or a file that is neither a LoRA nor a base."""
    try:
        base = open_base(source.path if source.path is not None else "")
    except ProLoRAError as error:
        if not any(tensor_keys.is_base_weight(key) for key in source.headers):
            return Description(kind="unknown", reason=_unknown_reason(source), **common)
        return _describe_unread_base(source, str(error), common)
    form = "diffusers" if _has_canonical_names(source, base) else "single-file"
    return replace(_describe_base(base, str(source.path), form), **common)


def _has_canonical_names(source: Lora, base: Base) -> bool:
    """Whether a file spells the modules of its base as diffusers does."""
    keys = source.headers.keys()
    prefixes = ("", "unet.", "transformer.")
    spelled = (
        (f"{prefix}{name}{suffix}" for prefix in prefixes for suffix in (".weight", ""))
        for name in base.shapes
    )
    return all(any(key in keys for key in spellings) for spellings in spelled)


def _describe_unread_base(source: Lora, reason: str, common: dict[str, Any]) -> Description:
    """A checkpoint that `transfer` would refuse, as far as its keys tell."""
    names = [
        module_names.parse_module_path(key.removesuffix(".weight").removeprefix(_LDM_PREFIX))
        for key, header in source.headers.items()
        if key.endswith(".weight") and len(header.shape) > 1
    ]
    modules = [module for path in names if path for module in path.modules]
    return Description(
        kind="base",
        format="single-file",
        supported=False,
        reason=reason,
        modules=count_values(map(find_component, modules)),
        types=count_values(map(_layer_type, modules)),
        **common,
    )


def _describe_base(base: Base, path: str, form: str) -> Description:
    """A base model that `transfer` would open the same way."""
    shapes = {name: (shape[0], shape[1]) for name, shape in base.shapes.items()}
    return Description(
        path=path,
        kind="base",
        format=form,
        spelling="diffusers" if form == "diffusers" else "sgm",
        supported=True,
        family=base.layout or base.family or guess_family(shapes, {}),
        modules=count_values(find_component(name) for name in shapes),
        types=count_values(_layer_type(name) for name in shapes),
        dtypes=count_values(str(dtype).removeprefix("torch.") for dtype in base.dtypes.values()),
        tensors=len(shapes),
        quantised=base.quantised_as,
        size=sum(file.stat().st_size for file in base.files),
    )


def _unknown_reason(source: Lora) -> str:
    if not source.headers:
        return "it holds no tensors"
    first = ", ".join(list(source.headers)[:3])
    reason = f"its keys are neither a LoRA's nor a base model's: {first}"
    kind = tensor_keys.explain_other_kind(source.headers)
    return f"{reason}. {kind}" if kind else reason


def _base_model(metadata: dict[str, str]) -> str | None:
    """The base model by hash, name or version, as far as the metadata tells."""
    known = known_base(metadata)
    if known:
        return known[0]
    fields = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
    named = next((metadata[field] for field in fields if metadata.get(field)), None)
    # An architecture has the kind of file behind it: stable-diffusion-xl-v1-base/lora.
    return None if named is None else Path(named.removesuffix("/lora")).name


def _base_hash(metadata: dict[str, str]) -> str | None:
    """The hash of the base model's file, the full one where there is one."""
    fields = ("ss_new_sd_model_hash", "ss_sd_model_hash")
    return next((metadata[f] for f in fields if metadata.get(f)), None)


def _trigger_words(metadata: dict[str, str]) -> list[str]:
    """The trigger phrase if there is one, then the most frequent tags of the training set."""
    words = read_training_words(metadata)
    first = [words.trigger] if words.trigger else []
    return first + [tag for tag in words.list_tags(_TOP_TAGS) if tag not in first]
