"""What a file says of itself, from its header and its scales; of a LoRA without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.algorithms import forms
from ..adapters.contents import parse_contents, read_scale
from ..adapters.formats.moves import StatedBase, read_moves
from ..adapters.formats.programs import ask_programs, is_read_after
from ..adapters.key_groups import Contents, Slot, measure_modules
from ..adapters.keys import tensor_keys
from ..adapters.keys.codec import Codec, CutPath, read_without_family
from ..adapters.lora import Lora
from ..adapters.trigger_words import read_trigger_words
from ..architectures.families import known_families, list_loaded
from ..architectures.identify import (
    NamedMatrix,
    find_foreign,
    identify_base,
    identify_names,
    is_language_model,
    share_rows,
)
from ..architectures.loaders import known_loaders
from ..architectures.modules import TEXT_ENCODERS, find_component, matrix_shape
from ..bases.describe import BaseShapes
from ..core.grouping import group_by
from ..errors import ProLoRAError
from ..files.dtypes import spell_dtype
from .check_result import Check, Part, count_values
from .defects import find_deep_defects, find_defects

if TYPE_CHECKING:  # torch, which takes a second to import, is needed where a base is read
    from ..bases import Base

_TOP_TAGS = 10


def check_tensors(opened: Lora, program: str | None = None, deep: bool = False) -> Check:
    """Reports what a file of tensors is: a LoRA, or a base model, or neither.

    `program` is a key of `known_loaders()`; `deep` reads every tensor.
    """
    metadata = opened.metadata
    fields = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
    named = next(filter(None, map(metadata.get, fields)), "")
    hashes = map(metadata.get, ("ss_new_sd_model_hash", "ss_sd_model_hash"))
    words = read_trigger_words(metadata)
    tags = [tag for tag in words.list_tags(_TOP_TAGS) if tag != words.trigger]
    result = Check(
        path=opened.where,
        kind="lora",
        dtypes=count_values(spell_dtype(x.dtype) for x in opened.tensors.values()),
        tensors=len(opened.tensors),
        size=opened.path.stat().st_size if opened.path else 0,
        # An architecture has the kind of file behind it: stable-diffusion-xl-v1-base/lora.
        base_model=Path(named.removesuffix("/lora")).name if named else "",
        base_hash=next(filter(None, hashes), "") or "",
        family_claimed=opened.model.claimed or "",
        version_claimed=opened.model.version or "",
        stated=StatedBase.read(metadata, opened.model.version),
        trigger_words=tuple([words.trigger, *tags] if words.trigger else tags),
        moves=read_moves(metadata),
    )
    try:
        contents = parse_contents(opened)
        scales = {slot.module.name: read_scale(slot, opened) for slot in contents.slots}
    except ProLoRAError as error:
        return _describe_refused(opened, result, str(error))
    defects = find_defects(contents, opened, program)
    defects += find_deep_defects(contents, scales, opened) if deep else []
    defects = list(dict.fromkeys(defects))  # both notice a file of zeros
    described = _describe_contents(opened, contents, scales, result, program)
    return replace(described, defects=tuple(defects))


def _describe_contents(
    opened: Lora,
    contents: Contents,
    scales: Mapping[str, float],
    result: Check,
    program: str | None,
) -> Check:
    slots, shapes = contents.slots, measure_modules(contents.slots)
    paths = [slot.module for slot in slots] or [one.module for one in contents.vectors]
    of_vectors = {name for one in contents.vectors for name in one.module.modules}
    whole = shapes | dict.fromkeys(of_vectors - shapes.keys(), (0, 0))
    model, families = opened.model, opened.model.families
    format = "peft" if opened.config is not None else paths[0].format
    loaded, spelled = list_loaded(families, model.sizes), (format, model.spelling)
    readers, skipped = ask_programs(slots, loaded, spelled, whole, program)
    needs_base = any(forms.needs_base(slot.keys.keys()) for slot in slots)
    foreign = tuple(find_foreign(model, shapes))
    whole_again = not (needs_base or foreign or contents.unread)
    language = not model.names and is_language_model(shapes)
    by_part = group_by(slots, lambda slot: find_component(slot.module.name))
    return replace(
        result,
        reason="it is a language model's, and prolora takes diffusion models alone" * language,
        format=format,
        spelling="sgm" if any(path.sgm for path in paths) else "diffusers",
        algorithms=count_values([slot.kind for slot in slots] or ["norm"]),
        needs_base=needs_base,
        families=families,
        named=model.names,
        foreign=foreign,
        sizes=model.sizes,
        parts={
            name: _describe_part(by_part[name], opened, scales)
            for name in sorted(by_part, key=TEXT_ENCODERS.__contains__)  # these go last
        },
        modules=count_values(map(find_component, shapes)),
        vectors=count_values("bias" if x.tensor == "bias" else "norm" for x in contents.vectors),
        left_out=count_values(contents.left_out.values()),
        readers=readers,
        program=known_loaders()[program].title if program else "",
        skipped=skipped,
        convertible=whole_again and is_read_after(loaded, program, whole),
    )


def _describe_part(slots: list[Slot], opened: Lora, scales: Mapping[str, float]) -> Part:
    ranks = Counter(slot.form.rank for slot in slots if slot.form.rank)
    return Part(
        len(slots),
        count_values(slot.kind for slot in slots),
        dict(sorted(ranks.items())),
        count_values(_read_alpha(slot, opened) for slot in slots),
        count_values(f"{scales[slot.module.name]:.4g}" for slot in slots),
    )


def _read_alpha(slot: Slot, opened: Lora) -> str:
    if slot.peft:
        return f"{slot.peft.alpha(slot.module.local):g}"
    key = slot.keys.get("alpha")
    return "none" if key is None else f"{opened.read_number(key):g}"


def _describe_refused(opened: Lora, result: Check, reason: str) -> Check:
    """Describes a base, an adapter of an unread kind, or neither."""
    is_adapter = any(map(tensor_keys.is_of_adapter, opened.tensors))
    if any(map(tensor_keys.is_base_weight, opened.tensors)):
        try:
            if opened.path is None:
                return _check_state_dict(opened, result)
            return replace(check_model(opened.path), path=result.path, size=result.size)
        except ProLoRAError as error:
            if not is_adapter:
                return replace(result, kind="base", reason=str(error))
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            return _name_by_header(opened, result)
    return replace(result, kind="lora" if is_adapter else "unknown", reason=reason)


def _check_state_dict(opened: Lora, result: Check) -> Check:
    """Recognises a base model in memory, by names and shapes."""
    from ..bases import open_base

    shapes = {key: tensor.shape for key, tensor in opened.tensors.items()}
    described = _describe_base(open_base(shapes, read=opened.read), result.path, "state dict")
    return replace(described, dtypes=result.dtypes)


def _name_by_header(opened: Lora, result: Check) -> Check:
    """Recognises a base model by names and shapes, where torch is missing."""
    base, dtypes = read_base_shapes(opened)
    return Check(
        path=result.path,
        kind="base",
        format="single-file",
        families=base.model.families,
        sizes=base.model.sizes[:1],
        modules=count_values(map(find_component, base.shapes)),
        dtypes=count_values(dtypes),
        tensors=len(base.shapes),
        size=result.size,
    )


def read_base_shapes(opened: Lora) -> tuple[BaseShapes, list[str]]:
    """Reads a base model's names, shapes and dtypes from its header, without torch."""
    matrices = {
        key.removesuffix(".weight"): matrix_shape(tensor.shape)
        for key, tensor in opened.tensors.items()
        if key.endswith(".weight") and len(tensor.shape) > 1
    }
    cuts = ((read_without_family(path), size) for path, size in matrices.items())
    ids = identify_names(
        NamedMatrix(cut.rest, cut.dotted, size) for cut, size in cuts if isinstance(cut, CutPath)
    )
    codec = Codec(known_families()[ids[0]] if ids else None)
    shapes, dtypes = dict[str, tuple[int, int]](), list[str]()
    keys, name = dict[str, str](), Path(opened.where).name
    for path, size in matrices.items():
        if module := codec.read(path):
            parts = share_rows(module.matrix, size) if module.matrix else {module.name: size}
            dtypes += [spell_dtype(opened.tensors[f"{path}.weight"].dtype)] * len(parts)
            shapes |= parts
            keys |= dict.fromkeys(parts, f"{name}:{path}.weight")
    return BaseShapes(name, shapes, keys, identify_base(shapes)), dtypes


def check_model(path: Any) -> Check:
    """Describes what a base model is that `transfer` would open."""
    from ..bases import open_base
    from ..bases.folder import find_expert_folders

    experts = find_expert_folders(Path(path))
    base = open_base(experts[0] if experts else path)
    is_gguf = Path(path).suffix.lower() == ".gguf"
    form = "diffusers" if Path(path).is_dir() else "gguf" if is_gguf else "single-file"
    names = tuple(folder.name for folder in experts)
    return replace(_describe_base(base, str(path), form), experts=names)


def _describe_base(base: Base, path: str, format: str) -> Check:
    shapes = {name: (shape[0], shape[1]) for name, shape in base.shapes.items()}
    return Check(
        path=path,
        kind="base",
        format=format,
        families=base.model.families,
        sizes=(base.layout,) if base.layout else (),
        modules=count_values(map(find_component, shapes)),
        dtypes=count_values(str(dtype).removeprefix("torch.") for dtype in base.dtypes.values()),
        tensors=len(shapes),
        quantised=base.quantised_as,
        size=sum(file.stat().st_size for file in base.files),
    )
