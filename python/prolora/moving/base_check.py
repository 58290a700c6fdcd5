"""Whether a LoRA belongs to the source that it is moved from: told before a weight is read.

Modules and shapes must fit the source. What the header says of the base is believed where it is a
hash; a name only warns, since people rename files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..adapters.adapter import Adapter
from ..adapters.contents import parse_contents
from ..adapters.family_guess import guess_families, guess_family, guess_sizes, is_language_model
from ..adapters.formats.moves import Move, describe_moves, read_moves
from ..adapters.lora import Lora
from ..adapters.reading import outline_adapter
from ..adapters.slots import list_matrices, measure_modules
from ..architectures.families import find_title, join_titles, known_families
from ..architectures.modules import find_block, is_in_text_encoder
from ..bases import Base
from ..bases.cache.basis_cache import BasisCache
from ..bases.describe import describe_base
from ..bases.identity import EMPTY_SHORT_HASH, compute_short_hash, have_equal_files, is_identical
from ..errors import AlreadyMoved, ProLoRAError, ShapeMismatch, UnsupportedFormat, WrongBase
from .options import LoraLike, TransferOptions, begin_message
from .plan import OTHER_MODEL, check_fits_source

# Words of file names for the form in which a model is stored, not for the model.
_FORMS = re.compile(
    r"safetensors|gguf|diffusers|b?fp?(?:8|16|32)|float(?:8|16|32)|half|int8|scaled|e4m3(?:fn)?|e5m2"
    r"|pruned|emaonly|ema|noema"
)
_QUANTISED = re.compile(r"(?<![a-z0-9])i?q\d(?:_[a-z0-9]+)*")  # GGUF's Q4_K_M and the like
_NO_HASHES = "a file, a folder and a model in memory have no hashes to compare"
NAMED_BASE = "base_model_name_or_path"
"""Where PEFT's configuration names the base."""
# Names of folders and objects that any model may have.
_ANY_MODEL = {"unet", "transformer", "transformer 2", "model", "diffusion pytorch model", ""}


def check_moved_before(
    lora: LoraLike, source: Base, options: TransferOptions, cache: BasisCache | None = None
) -> str:
    """Refuses to move a LoRA on from a base that it does not belong to; returns what is doubtful.

    The header of a result names the base that it was moved to, with its hash. A renamed file is the
    same base. A file with the same name and another hash may be the base in another precision: it
    is accepted, and it is said what was compared.
    """
    metadata = read_header(lora)
    moves = read_moves(metadata)
    if not moves or options.again:
        return ""
    last = moves[-1]
    reason, doubt = _explain_other_base(last, source, metadata.get("ss_sd_model_hash"), cache)
    if reason is None:
        return doubt
    raise AlreadyMoved(
        f"{begin_message(lora)}this LoRA was already moved {describe_moves(moves)}, but the source "
        f"is {source.name}, {reason}; give {last.target} as the source, or take `again=True` to "
        "move it all the same"
    )


def find_newer_base(metadata: Mapping[str, str], base: str) -> str:
    """Returns the base that a LoRA was moved to last from this one.

    "" for none; the names must be equal.
    """
    moves = read_moves(metadata)
    if not moves or moves[-1].source != base:
        return ""
    old, new = fold_base_name(base), fold_base_name(moves[-1].target)
    return "" if new == old or old in _ANY_MODEL else moves[-1].target


def read_header(lora: LoraLike) -> Mapping[str, str]:
    """Reads a LoRA's header and PEFT's base name; a state dict has none."""
    if isinstance(lora, Adapter):
        return lora.metadata
    if isinstance(lora, Mapping):
        return {}
    opened = Lora.open(lora)
    named = (opened.config or {}).get(NAMED_BASE)
    return {NAMED_BASE: named} | opened.metadata if isinstance(named, str) else opened.metadata


def _explain_other_base(
    last: Move, source: Base, short_hash: str | None, cache: BasisCache | None
) -> tuple[str | None, str]:
    """Explains why a base is not the LoRA's last one, or doubts it.

    The first is None if it may be that base.
    """
    same = is_identical(source, last.target_hash, short_hash, cache.folder if cache else None)
    named, moved = fold_base_name(source.name), fold_base_name(last.target)
    if same and (named == moved or not last.target_hash.startswith("hint:")):
        return None, ""
    if same:
        doubt = f"{source.name} has its size and equal pieces, so it is taken for the same model"
        return None, f"The LoRA was moved to {last.target}; {doubt}."
    told_by_name = moved not in (fold_base_name(last.source), *_ANY_MODEL)
    if told_by_name and named == moved:
        told = "another hash" if same is False else "no hash to compare"
        doubt = f"{source.name} has that name and {told}, so it is taken for the same model"
        return None, f"The LoRA was moved to {last.target}; {doubt}."
    if same is None and (not told_by_name or named in _ANY_MODEL or not source.files):
        doubt = f"whether {source.name} is that model cannot be told: {_NO_HASHES}"
        return None, f"The LoRA was moved to {last.target}; {doubt}."
    if not told_by_name:
        return "another file", ""
    if source.name == last.source:
        return "the base that it was moved from", ""
    return f"another model by {f'its name ({_NO_HASHES})' if same is None else 'name and hash'}", ""


def fold_base_name(name: str) -> str:
    """Folds a base's name: no folders, case or words for its storage."""
    plain = _QUANTISED.sub("", re.split(r"[/\\]", name)[-1].lower())
    words = re.split(r"[\s._-]+", plain)
    return " ".join(word for word in words if word and not _FORMS.fullmatch(word))


HASH_KEYS = ("ss_new_sd_model_hash", "ss_sd_model_hash")
"""Where sd-scripts writes which file the base was."""
_NAME_KEYS = ("ss_sd_model_name", NAMED_BASE)


def check_bases(
    lora: LoraLike,
    source: Base,
    target: Base,
    options: TransferOptions,
    cache: BasisCache | None = None,
    may_be_one: bool = False,
) -> list[str]:
    """Refuses a wrong source for the LoRA, and a target that is its base; returns doubts.

    Of a file the header alone is read. With `options.again` the LoRA need only fit the source;
    `may_be_one` allows source and target to be one model.
    """
    if misfit := explain_misfit(lora, source, target):
        raise misfit
    if options.again:
        return []
    doubts = [check_moved_before(lora, source, options, cache)]
    header = read_header(lora)
    where = begin_message(lora)
    if not may_be_one and are_one_base(source, target):
        raise WrongBase(
            f"{where}the source, {source.name}, and the target, {target.name}, are the same model, "
            "where the LoRA works as it is; choose another target, or take `again=True` to move it "
            "all the same"
        )
    if is_stated_base(header, target, cache) and not is_stated_base(header, source, cache):
        raise WrongBase(
            f"{where}by the hash in its header this LoRA was trained on the target, {target.name}, "
            f"and not on the source, {source.name}: did you swap them? If not, `again=True` moves "
            "it all the same"
        )
    if is_named_base(header, target.name) and not is_named_base(header, source.name):
        doubts.append(
            f"Were source and target swapped? The LoRA's header gives the name of the target, "
            f"{target.name}, as the model that it was trained on, and not {source.name}."
        )
    if source.layout and not isinstance(lora, Adapter):
        sizes = measure_modules(parse_contents(Lora.open(lora)).slots, with_kernel=True)
        blocks = {block[:2] for name in sizes if (block := find_block(name))}
        places = {block[:2] for name in source.shapes if (block := find_block(name))}
        stacks = {stack for stack, _ in blocks}
        # Only where some blocks of the source are left out may it be for a smaller size.
        found = guess_sizes(sizes) if blocks < {b for b in places if b[0] in stacks} else ()
        if found and source.layout not in found:
            smaller, own = join_titles(map(find_title, found)), find_title(source.layout)
            doubts.append(
                f"Is this the LoRA's base? It has all blocks of {smaller}; the source, "
                f"{source.name}, is {own}."
            )
    return [doubt for doubt in doubts if doubt]


def explain_misfit(
    lora: LoraLike, source: Base, target: Base | None = None
) -> UnsupportedFormat | ShapeMismatch | WrongBase | None:
    """Explains why a LoRA does not fit its source, None if it may.

    Modules and shapes alone decide; of a file, the header alone is read. `target` is the base that
    it may belong to instead.
    """
    misfit = _find_misfit(lora, source)
    if misfit is None:
        return None
    fitting = target if target is not None and _find_misfit(lora, target) is None else None
    ours, theirs = (
        describe_kind(fitting) if fitting else _describe_lora(lora),
        describe_kind(source),
    )
    sentences = []
    if ours is not None and ours != theirs:
        sentences.append(
            f"This LoRA is for {ours}. The source you gave, {source.name}, is {theirs}."
        )
    if fitting:
        sentences.append("It fits the target and not the source: did you swap them?")
    where = begin_message(lora)
    told = str(misfit).removeprefix(where)
    if not sentences:
        named = where.removesuffix(": ") in told or told != str(misfit) or misfit.command
        return misfit if named else type(misfit)(f"{where}{told}")
    kind = WrongBase if fitting else type(misfit)
    error = kind(f"{where}{' '.join(sentences)} ({told.removesuffix(OTHER_MODEL)})")
    error.__cause__ = misfit
    return error


def _find_misfit(lora: LoraLike, base: Base) -> UnsupportedFormat | ShapeMismatch | None:
    """Finds why a LoRA does not fit a base, by modules and shapes.

    None if it may.
    """
    try:
        adapter = (
            lora
            if isinstance(lora, Adapter)
            else outline_adapter(lora, base.shapes, base.family, headers_only=True)
        )
        modules = [name for name in adapter.updates if not is_in_text_encoder(name)]
        check_fits_source(adapter, modules, base)
    except (UnsupportedFormat, ShapeMismatch) as error:
        return error
    return None


def is_stated_base(
    header: Mapping[str, str], base: Base, cache: BasisCache | None = None
) -> bool | None:
    """Returns whether a base is the one whose hash a LoRA's header gives.

    sd-scripts and what came from it write two hashes: `ss_new_sd_model_hash`, the SHA-256 of the
    file, and `ss_sd_model_hash`, eight digits of the hash of 64 KiB, which fine-tunes may share. So
    the first decides where there are both. A word instead of a hash says that there was no one
    file. None where nothing tells.
    """
    full, short = (_read_digits(header, *key) for key in zip(HASH_KEYS, (64, 8), strict=True))
    if full:
        return is_identical(base, f"sha256:{full}", short, cache.folder if cache else None)
    if short in ("", EMPTY_SHORT_HASH) or len(base.files) != 1:
        return None
    return compute_short_hash(base) == short


def is_named_base(header: Mapping[str, str], *names: str) -> bool:
    """Returns whether a LoRA's header names a base by one of its names."""
    stated = {fold_base_name(header[key]) for key in _NAME_KEYS if header.get(key)} - {""}
    return any(fold_base_name(name) in stated for name in names)


def are_one_base(source: Base, target: Base) -> bool:
    """Returns whether two bases are one model: same files, copies, or object."""
    if source is target:
        return True
    if not source.files or not target.files:
        return False
    ours, theirs = ({file.resolve() for file in base.files} for base in (source, target))
    if ours <= theirs or theirs <= ours:  # a pipeline's folder, and that of its model alone
        return True
    return have_equal_files(source, target)


def _describe_lora(lora: LoraLike) -> str | None:
    """Returns the title of a LoRA's model by modules and shapes, if known."""
    families, names = guess_lora_families(lora)
    if families:
        return join_titles(known_families()[family].title for family in families)
    return "a language model" if is_language_model(names) else None


def guess_lora_families(lora: LoraLike) -> tuple[tuple[str, ...], list[str]]:
    """Returns a LoRA's possible families and its modules, from the header alone."""
    if isinstance(lora, Adapter):
        sizes = {name: (update.shape[0], update.shape[1]) for name, update in lora.updates.items()}
        return guess_families(sizes, lora.metadata), list(lora.updates)
    opened = Lora.open(lora)
    try:
        sizes = measure_modules(parse_contents(opened).slots)
    except ProLoRAError:  # its reader says why
        return (), []
    families = guess_families(sizes, opened.metadata, matrices=list_matrices(opened))
    return families, list(sizes)


def describe_kind(base: Base) -> str:
    """Returns the title of a base's family, or what it looks like."""
    sizes = {name: (shape[0], shape[1]) for name, shape in base.shapes.items()}
    family = base.family or guess_family(sizes, {})
    return known_families()[family].title if family else describe_base(base)


def _read_digits(header: Mapping[str, str], key: str, count: int) -> str:
    """Returns a hash of so many hexadecimal digits, "" for anything else."""
    text = header.get(key, "").lower()
    return text if re.fullmatch(f"[0-9a-f]{{{count}}}", text) else ""
