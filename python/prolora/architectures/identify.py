"""The one answer to "which model is it for?": by names, then sizes, then what a header claims.

Names alone rarely decide: `transformer_blocks.0.attn.to_q` is in a dozen families. Sizes mostly do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from functools import cache, lru_cache
from typing import NamedTuple

from .families import known_families
from .family import AuthorsWeight, Family, Spelling, list_trials
from .layouts import BESIDE, Layout, find_likely_layouts, load_layout
from .loaders import is_read, is_usual, list_programs
from .modules import TEXT_ENCODERS, find_block, find_component, matrix_shape

Size = tuple[int, int]
"""Out × in of a matrix; 0 where it is not known."""

_LANGUAGE_MODEL = re.compile(r"(?:^|\.)layers\.\d+\.(?:self_attn|mlp)\.\w+_proj$")
_ADAPTER = re.compile(
    r"^(?:lora_(?:unet|te\d?|transformer)_|lycoris_)"
    r"|\.(?:lora_(?:up|down|mid|A|B|magnitude_vector)|dora_scale|(?:hada|lokr)_w\d\w*)(?:\.|$)"
    r"|(?:\.|_)lora\.(?:up|down)\.|\.base_layer\."
)
NUM_BLOCKS = "base_num_blocks"
"""In `ss_network_args`: the blocks of the base, 28 of Anima and 40 of Anima 2.9B, as trainers of
Anima write it. A LoRA on some blocks alone does not tell them."""
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


class NamedMatrix(NamedTuple):
    """A module as a file names it."""

    name: str  # without any prefix
    dotted: bool = True  # False where underscores replace the dots
    shape: Size = (0, 0)


class Model(NamedTuple):
    """What a file or a base is for; all ids, best first."""

    families: tuple[str, ...] = ()  # all with a published size that has every module in its shape
    sizes: tuple[str, ...] = ()  # those published sizes
    claimed: str | None = None  # the family that the header claims
    version: str | None = None  # how the header calls the model: "FLUX.1 Kontext", "Wan 2.2"
    encoders: tuple[str, ...] = ()  # text encoders with modules in it: "text_encoder", …
    spelling: Spelling | None = None  # of a transformer's modules in the file
    # The families that fit best by name, whatever the shapes; the names are those of the first
    names: tuple[str, ...] = ()
    able: tuple[str, ...] = ()  # all families that have every name

    @classmethod
    def of(cls, *families: str) -> Model:
        """Returns the model of something that is of some families for certain."""
        return cls(families, names=families, able=families)

    @property
    def family(self) -> str | None:
        """The only family that fits; where no published size does, the only one by its names."""
        ids = self.families or self.names
        return ids[0] if len(ids) == 1 else None

    def spelled(self, spelling: Spelling | None) -> Model:
        """Returns the model of a file in a spelling.

        Among families that fit equally well, only those with files in this spelling remain.
        """
        families = known_families()
        able = [id_ for id_ in self.families if spelling and is_read(families[id_], spelling)]
        # A trainer may write what few programs read: that alone makes nothing certain.
        certain = any(spelling and is_usual(families[id_], spelling) for id_ in able)
        return self._replace(spelling=spelling)._narrow(able if certain else self.families)

    def of_base(self, base: Model) -> Model:
        """Returns the model of a LoRA that is for a base: what is known of that decides."""
        if not base.families:
            return self
        # The sizes of another family say nothing here: FLUX.1 has two text encoders, Chroma one.
        own = self._narrow(base.families)
        return own._replace(names=base.families, able=base.able, sizes=own.sizes or base.sizes)

    def shared_with(self, other: Model) -> Model:
        """Returns what two LoRAs of one base can both be for."""
        both = [id_ for id_ in self.families if id_ in other.families]
        sizes = tuple(size for size in self.sizes if size in other.sizes)
        return self._narrow(both)._replace(sizes=sizes) if both else self

    def _narrow(self, families: Collection[str]) -> Model:
        sizes = {size for id_ in families for size in known_families()[id_].layouts}
        remaining = tuple(size for size in self.sizes if size in sizes)
        return self._replace(families=tuple(families), sizes=remaining)


UNKNOWN = Model()
"""Nothing is known."""


def identify(
    shapes: Mapping[str, Size], header: Mapping[str, str], paths: Iterable[NamedMatrix] = ()
) -> Model:
    """Returns the models that some modules belong to.

    A module that no family knows is ignored, unless such modules are the majority; one that some
    family knows must be known to every family of the answer. A family with a published size in
    which every module has its very shape fits; where none fits outside the blocks, the blocks
    decide. Of sizes that fit, those whose blocks are all present count, or those with the number of
    blocks that the header states (`NUM_BLOCKS`). What the header claims decides between families
    that fit equally well, and where there are modules of text encoders alone.

    Args:
        shapes: canonical module name -> out × in, in·kh·kw of a convolution.
        header: metadata of the file.
        paths: further modules under the names of a file, which may be its authors'.
    """
    claimed, version = _find_claim(header)
    components = {find_component(name) for name in shapes}
    encoders = tuple(one for one in TEXT_ENCODERS if one in components)
    matrices = [NamedMatrix(name, True, size) for name, size in shapes.items()]
    matrices = [one for one in matrices if find_component(one.name) not in TEXT_ENCODERS]
    every = tuple(dict.fromkeys([*paths, *matrices]))
    if not every:
        families = (claimed,) if claimed else ()
        return Model(families, (), claimed, version, encoders, names=families, able=families)
    model = _recognise(every, claimed, read_block_count(header))
    return model._replace(claimed=claimed, version=version, encoders=encoders)


def identify_base(shapes: Mapping[str, tuple[int, ...]]) -> Model:
    """Returns what model a checkpoint (module -> shape of its weight) is.

    It has the blocks of a published size, name by name and shape by shape. Where no size fits, a
    transformer may have the names of one, no more and no less, whatever the number of its blocks
    and their shapes; where several families have these names, shapes decide.
    """
    layout = find_layout(shapes)
    families = known_families()
    if layout is not None:
        ids = tuple(id_ for id_, family in families.items() if layout.id in family.layouts)
        return Model.of(*ids)._replace(sizes=(layout.id,))
    named = {n: s for n, s in shapes.items() if find_component(n) not in TEXT_ENCODERS}
    # Some transformers have a `time_embedding` too, beside blocks that no UNet has.
    if not any(find_component(name) == "transformer" for name in named):
        return Model()
    patterns = _list_patterns(named)
    ids = tuple(
        id_
        for id_, family in families.items()
        if any(patterns == _layout_patterns(size) for size in family.layouts)
    )
    if len(ids) > 1:
        likely = identify_names(select_kinds(named))
        ids = tuple(id_ for id_ in ids if id_ in likely)
    return Model.of(*ids) if len(ids) == 1 else Model()


def identify_names(matrices: Iterable[NamedMatrix]) -> tuple[str, ...]:
    """Returns the families that can read some modules of a checkpoint, best first.

    Other modules may stand beside its blocks.
    """
    every = tuple(dict.fromkeys(matrices))
    in_blocks = tuple(one for one in every if find_block(one.name))
    return _recognise(every, None).names or _recognise(in_blocks, None).names


@lru_cache(maxsize=16)  # the LoRAs of a folder mostly have the same modules
def _recognise(given: tuple[NamedMatrix, ...], claimed: str | None, blocks: int = 0) -> Model:
    """Returns the families, sizes, names and able families of some modules."""
    # Some transformers have a `time_embedding` or `conv_in` too, beside blocks that no UNet has.
    unet = all(find_component(one.name) == "unet" for one in given)
    families = {id_: one for id_, one in known_families().items() if one.unet == unet}
    holders = {module: ids for module in given if (ids := _list_candidates(module, unet))}
    if not holders or 2 * len(holders) < len(given):
        return Model()
    able = frozenset.intersection(*set(holders.values()))
    shapes = {
        id_: {n: size for one in holders for n, size in find_parts(families[id_], one).items()}
        for id_ in sorted(families, key=lambda id_: -len(list_programs(id_)))
        if id_ in able
    }
    exact: dict[str, list[str]] = {}
    for within_blocks in (False, True):  # where no family fits, a module beside them may be changed
        exact = exact or {
            id_: fitting
            for id_, modules_of in shapes.items()
            if (fitting := _fit_layouts(families[id_], modules_of, within_blocks))
        }
    if claimed in exact:
        exact = _prefer_filled({claimed: exact[claimed]}, shapes)
    stated = {id_: [x for x in of if count_main_blocks(x) == blocks] for id_, of in exact.items()}
    exact = {id_: of for id_, of in stated.items() if of} or _prefer_filled(exact, shapes)
    exact = {id_: of for id_, of in exact.items() if families[id_].rarer_than not in exact}
    sizes = tuple(size for fitting in exact.values() for size in fitting)
    best = tuple(exact) or _choose_names(shapes, claimed)
    return Model(tuple(exact), sizes, names=best, able=tuple(shapes))


def read_block_count(header: Mapping[str, str]) -> int:
    """Returns the number of blocks of the base that a LoRA was trained on; 0 if unknown."""
    with suppress(AttributeError, ValueError, RecursionError):  # a header that is damaged
        number = json.loads(header.get("ss_network_args", "{}")).get(NUM_BLOCKS, 0)
        return int(number) if str(number).isdecimal() else 0
    return 0


def _choose_names(shapes: Mapping[str, Mapping[str, Size]], claimed: str | None) -> tuple[str, ...]:
    """Returns the families, among those with all names, whose proportions fit best."""
    if claimed and claimed in shapes:
        return (claimed,)
    families = known_families()
    within = [id_ for id_ in shapes if _has_names(families[id_], shapes[id_])]
    likely = [id_ for id_ in within or shapes if families[id_].rarer_than not in shapes]
    scores = {id_: _count_proportions(families[id_], shapes[id_]) for id_ in likely}
    return tuple(id_ for id_ in scores if scores[id_] == max(scores.values()))


def _list_candidates(module: NamedMatrix, unet: bool) -> frozenset[str]:
    """Returns the families with a pattern for a name.

    They are few, so thousands of names take no time.
    """
    holders = _find_holders(module.dotted, unet)
    patterns = list_trials(module.name, "." if module.dotted else "_")
    several = [holders[pattern] for pattern, _ in patterns if pattern in holders]
    return several[0] if len(several) == 1 else frozenset().union(*several)


@cache
def _find_holders(dotted: bool, unet: bool) -> dict[str, frozenset[str]]:
    """Returns pattern of a module or weight -> the UNets or transformers that have it."""
    holders: dict[str, list[str]] = {}
    for id_, family in known_families().items():
        for pattern in family.list_patterns(dotted=dotted) if family.unet == unet else ():
            holders.setdefault(pattern, []).append(id_)
    return {pattern: frozenset(ids) for pattern, ids in holders.items()}


def find_parts(family: Family, module: NamedMatrix) -> dict[str, Size]:
    """Returns the canonical modules in a matrix of a file -> their shapes; {} if unknown."""
    name, dotted, (out, inputs) = module
    canonical = family.find_module(name, dotted=dotted)
    if canonical is not None:
        return {canonical: (out, inputs)}
    weight = family.find_weight(name, dotted=dotted)
    return share_rows(weight, (out, inputs)) if weight else {}


def share_rows(weight: AuthorsWeight, shape: Size) -> dict[str, Size]:
    """Returns the shapes of a matrix's parts; 0 rows where they do not divide evenly."""
    heights = weight.split_rows(shape[0]) or (0,) * len(weight.parts)
    return {part: (rows, shape[1]) for part, rows in zip(weight.parts, heights, strict=True)}


def _fit_layouts(family: Family, shapes: Mapping[str, Size], within: bool) -> list[str]:
    """Returns the family's sizes with these shapes, everywhere or within blocks."""
    some = {name: size for name, size in shapes.items() if not within or find_block(name)}
    layouts = {id_: load_layout(id_).sizes for id_ in family.layouts if some}
    return [
        id_
        for id_, sizes in layouts.items()
        if all(n in sizes and _are_equal(s, sizes[n]) for n, s in some.items())
    ]


def _prefer_filled(
    exact: dict[str, list[str]], shapes: Mapping[str, Mapping[str, Size]]
) -> dict[str, list[str]]:
    """Returns the sizes whose blocks are all present, by family; if none, all.

    FLUX.1 has 19 and 38 blocks, HunyuanVideo 20 and 40 of the same names and shapes: a LoRA on
    blocks 0 to 18 and 0 to 37 is one for FLUX.1. A student's UNet has some of its teacher's stacks.
    """
    filled: dict[str, list[str]] = {}
    for id_, layouts in exact.items():
        blocks = _list_blocks(shapes[id_])
        unet = known_families()[id_].unet
        for layout in layouts if blocks else ():
            every = _count_blocks(layout)
            whole = blocks.keys() == every.keys() or not unet
            if whole and all(numbers == every.get(at) for at, numbers in blocks.items()):
                filled.setdefault(id_, []).append(layout)
    return filled or exact


def count_main_blocks(layout: str) -> int:
    """Returns the number of blocks in the longest stack of a published size, 40 of Anima 2.9B."""
    return max(map(len, _count_blocks(layout).values()), default=0)


@cache
def _count_blocks(layout: str) -> dict[str, set[str]]:
    return _list_blocks(load_layout(layout).shapes)


def _list_blocks(modules: Iterable[str]) -> dict[str, set[str]]:
    """Returns stack -> the numbers of its blocks that some modules lie in."""
    stacks: dict[str, set[str]] = {}
    for name in modules:
        block = find_block(name)
        if block is not None:
            stacks.setdefault(block.stack, set()).add(block.number)
    return stacks


def _has_names(family: Family, names: Iterable[str]) -> bool:
    every = set(names)
    return any(every <= load_layout(id_).shapes.keys() for id_ in family.layouts)


def _are_equal(shape: Size, published: Size) -> bool:
    """Compares the known sizes; rows that do not divide evenly match none."""
    if shape == published:
        return True
    if shape[0] == 0 and shape[1] != 0:
        return False
    return shape[0] in (0, published[0]) and shape[1] in (0, published[1])


def _count_proportions(family: Family, shapes: Mapping[str, Size]) -> int:
    """Counts the modules whose rows and columns are in a published proportion."""
    count = 0
    for name, (out, inputs) in shapes.items():
        published = [matrix_shape(shape) for shape in family.find_shapes(name)]
        count += any(out * n == inputs * m for m, n in published) if out and inputs else 0
    return count


def find_foreign(model: Model, modules: Iterable[str]) -> list[str]:
    """Lists the modules that none of a model's families has; all without a family.

    Modules of text encoders belong to other tables and are not listed.
    """
    sizes = [load_layout(size).shapes for size in model.sizes]
    families = [known_families()[id_] for id_ in model.families]
    return [
        name
        for name in modules
        if find_component(name) not in TEXT_ENCODERS
        and not any(name in size for size in sizes)
        and not (not sizes and any(family.find_pattern(name) for family in families))
    ]


def is_language_model(modules: Iterable[str]) -> bool:
    """Recognises a language model by modules of no known family."""
    return any(
        _LANGUAGE_MODEL.search(name) and find_component(name) not in TEXT_ENCODERS
        for name in modules
    )


def _find_claim(header: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Returns family and name of the model that the header claims."""
    for key in ("ss_base_model_version", "modelspec.architecture"):
        value = header.get(key, "").lower()
        for start, *claim in _claims():
            if value.startswith(start):
                return claim[0], claim[1]
    return None, None


@cache
def _claims() -> list[tuple[str, str, str]]:
    """Lists how versions and architectures begin in metadata, with family and model.

    The longest beginning comes first: "flux2" is not "flux".
    """
    families = known_families().values()
    listed = [(start, one.id, name) for one in families for start, name in one.claims.items()]
    return sorted(listed, key=lambda claim: -len(claim[0]))


def find_layout(shapes: Mapping[str, tuple[int, ...]]) -> Layout | None:
    """Returns the published size of a checkpoint, None if it is unknown.

    The attention must match the layout, name by name and shape by shape, and so must the
    feed-forward unless the checkpoint has none; where names do not tell which is which, all
    matrices of the blocks must. Everything else is ignored: `proj_in` is a convolution in some
    files and a linear layer in others, inpainting models have a wider first layer, and extra
    parameters do not make another architecture. Only where layouts share all their blocks (FLUX dev
    and schnell, PixArt α and Σ) must the names outside the blocks match too, and where these are
    the same as well (Wan 2.2 from text and from images) their shapes.
    """
    fitting = find_likely_layouts(shapes)
    if len(fitting) > 1:
        telling = set().union(*(layout.outside for layout in fitting))
        present = {name for name in telling if name in shapes}
        fitting = [layout for layout in fitting if layout.outside == present]
        equal = [
            layout
            for layout in fitting
            if all(
                matrix_shape(shapes[n]) == matrix_shape(layout.shapes[n]) for n in layout.outside
            )
        ]
        fitting = equal or fitting
    return fitting[0] if fitting else None


def _list_patterns(shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """Returns the names of the matrices that every file has, numbers as N."""
    matrices = (name for name, shape in shapes.items() if len(shape) == 2)
    return frozenset(_NUMBER.sub(".N", name) for name in matrices if not name.startswith(BESIDE))


@cache
def _layout_patterns(id_: str) -> frozenset[str]:
    return _list_patterns(load_layout(id_).shapes)


_MOST_KINDS = 4096
"""Of a hostile file's hundred thousand kinds of modules, only this many are looked at."""


def select_kinds(shapes: Mapping[str, tuple[int, ...]]) -> list[NamedMatrix]:
    """Selects the first and last module of every kind.

    A kind has equal names but for their numbers, and equal shapes.
    """
    kinds: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, shape in shapes.items():
        kinds.setdefault((_NUMBER.sub(".N", name), shape), []).append(name)
    chosen = [
        (name, shape)
        for (_, shape), names in list(kinds.items())[:_MOST_KINDS]
        for name in dict.fromkeys((names[0], names[-1]))
    ]
    return [NamedMatrix(name, True, matrix_shape(shape)) for name, shape in chosen]


def explain_adapter(keys: Collection[str]) -> str:
    """Explains why a LoRA is no base model; "" for keys of a model."""
    for key in filter(_ADAPTER.search, keys):
        # nunchaku calls the low-rank part of a quantised weight so, too.
        if f"{key.rpartition('.')[0]}.qweight" not in keys:
            return (
                f"is a LoRA or a model with one attached ({key}), in the place of a base model; "
                "give the checkpoint there that the LoRA was trained on, with nothing attached"
            )
    return ""
