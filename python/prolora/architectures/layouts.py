"""Known architectures: names and shapes of their weights, and which block came from which.

The tables are package data (`tables/*.json`). A checkpoint is recognised by what is in it and
never by what its file is called: every fine-tune of SDXL has the layout `sdxl`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources

from .modules import BARE, matrix_shape

# In FLUX and SD3 two streams attend together, and FLUX's single blocks fuse the feed-forward's
# second half with the attention's output.
_ATTENTION = re.compile(
    r"(?:\.|_)attn[12]?\.(?:to_(?:q|k|v|out\.0|add_out)|add_[qkv]_proj)$"  # LTX-2: audio_attn1
)
_FEED_FORWARD = re.compile(
    r"\.(?:audio_)?ff(?:_context|n)?\.net\.(?:0\.proj|2)$|(?:^|\.)single_transformer_blocks\.\d+\.proj_(?:mlp|out)$"
)
# Layers of HiDream-O1 that nothing runs: some files have them.
UNUSED = ("visual.deepstack_merger_list.",)
# Text encoders, and Anima's adapter, which is a model of its own in diffusers' folders.
BESIDE = ("text_encoder", "llm_adapter.", *UNUSED)
_IN_BLOCK = re.compile(r"(?:^|_)(?:blocks|block)\.")
_TABLES = resources.files(__package__) / "tables"
# "{0-18}" in a table stands for every number from 0 to 18.
_RANGE = re.compile(r"\{(\d+)-(\d+)\}")


@dataclass(frozen=True)
class Layout:
    """One architecture."""

    id: str  # for programs, such as "ssd-1b"
    title: str  # for people
    # canonical module -> shape of its weight, for every weight of two or more axes
    shapes: Mapping[str, tuple[int, ...]]
    text_encoders: tuple[str, ...] = ()  # architectures of `text_encoder`, `text_encoder_2`, …
    # what names of blocks begin with: `noise_refiner.`; empty for UNets
    stacks: tuple[str, ...] = ()

    @cached_property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """The shapes as matrices, out × in·kh·kw."""
        return {name: matrix_shape(shape) for name, shape in self.shapes.items()}

    @cached_property
    def attention(self) -> list[str]:
        """The modules q, k, v and out of all attention layers with diffusers' names."""
        return [name for name in self.shapes if _ATTENTION.search(name)]

    @cached_property
    def adapted(self) -> list[str]:
        """Attention and feed-forward, what most LoRAs train; all matrices of `unnamed_stacks`."""
        return [name for name in self.shapes if self.is_adapted(name)]

    @cached_property
    def outside(self) -> set[str]:
        """The modules outside all blocks: embeddings, first and last layers."""
        return {
            name
            for name in self.shapes
            if not _IN_BLOCK.search(name) and not name.startswith(self.stacks)
        }

    @cached_property
    def unnamed_stacks(self) -> tuple[str, ...]:
        """The stacks where names do not tell attention and feed-forward from the rest."""
        return tuple(
            stack
            for stack in self.stacks
            if not all(
                any(kind.search(name) for name in self.shapes if name.startswith(stack))
                for kind in (_ATTENTION, _FEED_FORWARD)
            )
        )

    def is_adapted(self, name: str) -> bool:
        """Returns whether most LoRAs train a module of this name, even of another layout."""
        if name.startswith(BESIDE):
            return False
        if name.startswith(self.unnamed_stacks):
            return not BARE.search(name)
        return bool(_ATTENTION.search(name) or _FEED_FORWARD.search(name))


@dataclass(frozen=True)
class Correspondence:
    """The source module that each target module was made from.

    Or that it resembles most. Equal names are not equal modules: students renumber the blocks they
    keep.
    """

    source: str  # layout id
    evidence: str  # where the rule is known from
    _steps: tuple[tuple[tuple[re.Pattern[str], str], ...], ...] = ()
    _no_partner: tuple[re.Pattern[str], ...] = ()

    def source_of(self, target_module: str) -> str | None:
        """Returns the source module for `target_module`, None if the source has none."""
        if any(pattern.search(target_module) for pattern in self._no_partner):
            return None
        name = target_module
        for step in self._steps:
            # One substitution a step: up_blocks.0 -> 1 must not go on to 2.
            for pattern, replacement in step:
                if pattern.search(name):
                    name = pattern.sub(replacement, name)
                    break
        return name if name in load_layout(self.source).shapes else None


@cache
def known_layouts() -> tuple[str, ...]:
    """Returns the ids of all layouts, sorted."""
    names = (entry.name for entry in _TABLES.iterdir())
    ids = sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))
    return tuple(id_ for id_ in ids if id_ != "correspondence")


@cache
def load_layout(id_: str) -> Layout:
    """Reads the table of a layout.

    Raises:
        KeyError: no such layout.
    """
    if id_ not in known_layouts():
        raise KeyError(f"no layout {id_}; known are {', '.join(known_layouts())}")
    table = json.loads(_read_table(f"{id_}.json"))
    shapes = {
        name: shape
        for text, names in table["shapes"].items()
        for shape in [_read_shape(text)]
        for pattern in names
        for name in _expand_ranges(pattern)
    }
    stacks = _find_stacks(name for names in table["shapes"].values() for name in names)
    return Layout(
        table["id"], table["title"], shapes, tuple(table["text_encoders"]), tuple(sorted(stacks))
    )


def load_patterns(layouts: Iterable[str]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Returns pattern of a module -> its shapes in some layouts.

    The pattern has N in place of the block's number.
    """
    patterns: dict[str, dict[tuple[int, ...], None]] = {}
    for id_ in layouts:
        table = json.loads(_read_table(f"{id_}.json"))["shapes"]
        entries = [(entry, shape) for shape, entries in table.items() for entry in entries]
        stacks = _find_stacks(entry for entry, _ in entries)
        for entry, text in entries:
            shape = _read_shape(text)
            patterns.setdefault(_generalise(entry, stacks), {})[shape] = None
    return {pattern: tuple(shapes) for pattern, shapes in patterns.items()}


def _generalise(entry: str, stacks: set[str]) -> str:
    """Replaces every block's number by N in an entry of a table."""
    entry = _RANGE.sub("N", entry)
    for stack in stacks:
        if entry.startswith(stack):
            number, dot, rest = entry[len(stack) :].partition(".")
            if dot and number.isdecimal():
                return f"{stack}N.{rest}"
    return entry


def _find_stacks(entries: Iterable[str]) -> set[str]:
    """Returns what stands before the numbers of blocks in the entries of a table."""
    return {entry[: match.start()] for entry in entries if (match := _RANGE.search(entry))}


def _expand_ranges(pattern: str) -> list[str]:
    """Returns all names that one entry of a table means."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    numbers = range(int(match[1]), int(match[2]) + 1)
    ends = _expand_ranges(pattern[match.end() :])
    return [f"{pattern[: match.start()]}{number}{end}" for number in numbers for end in ends]


def find_likely_layouts(shapes: Mapping[str, tuple[int, ...]]) -> list[Layout]:
    """Returns the layouts with the blocks of a checkpoint (module -> shape)."""
    shapes = {name: _drop_kernel(shape) for name, shape in shapes.items()}
    # The first attention that a table names rules out most of them.
    firsts = ((id_, _find_attention(id_)) for id_ in known_layouts())
    likely = [id_ for id_, first in firsts if first is None or shapes.get(first[0]) == first[1]]
    return [layout for layout in map(load_layout, likely) if _has_blocks(shapes, layout)]


@cache
def _find_attention(id_: str) -> tuple[str, tuple[int, ...]] | None:
    """Returns the first attention that a table names, and its shape without a kernel.

    Reading all of a table takes ten times as long.
    """
    for text, entries in json.loads(_read_table(f"{id_}.json"))["shapes"].items():
        for entry in entries:
            name = _RANGE.sub(lambda match: match[1], entry)
            if _ATTENTION.search(name):
                return name, _drop_kernel(_read_shape(text))
    return None


def _read_shape(text: str) -> tuple[int, ...]:
    """Reads a shape as tables write it, `640x320x3x3`."""
    return tuple(map(int, text.split("x")))


def _has_blocks(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> bool:
    """Returns whether a checkpoint has a layout's attention and feed-forward, and no other."""
    # Nearly every layout ends here, before all names of a large checkpoint are looked at.
    needed = layout.attention or layout.adapted
    if any(shapes.get(name) != _drop_kernel(layout.shapes[name]) for name in needed):
        return False
    adapted = {name: shape for name, shape in shapes.items() if layout.is_adapted(name)}
    has_feed_forward = any(not _ATTENTION.search(name) for name in adapted)
    names = layout.adapted if has_feed_forward else layout.attention
    return adapted == {name: _drop_kernel(layout.shapes[name]) for name in names}


def find_correspondence(source: str, target: str) -> Correspondence | None:
    """Returns the rule between two layouts, None if there is none."""
    return _load_rules().get((source, target))


@cache
def _load_rules() -> dict[tuple[str, str], Correspondence]:
    return {
        (entry["source"], entry["target"]): Correspondence(
            entry["source"],
            entry["evidence"],
            tuple(tuple((re.compile(a), b) for a, b in step) for step in entry["steps"]),
            tuple(re.compile(pattern) for pattern in entry["no_partner"]),
        )
        for entry in json.loads(_read_table("correspondence.json"))
    }


def _drop_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Turns the shape of a 1×1 convolution [m, n, 1, 1] into [m, n]."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _read_table(name: str) -> str:
    return (_TABLES / name).read_text("utf-8")
