"""The LoRA between two bases: W_tuned − W_base of every module, cut to its leading columns."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .. import adapters
from ..adapters.adapter import Adapter
from ..adapters.formats.metadata import rewrite_metadata
from ..adapters.formats.moves import read_provenance
from ..architectures.families import known_families
from ..architectures.modules import find_component, is_in_text_encoder, matrix_shape
from ..bases import Base, BaseLike, open_base
from ..bases.base import check_finite, list_quantised, stack_weights
from ..bases.describe import explain_no_layer
from ..bases.identity import compute_short_hash, name_base
from ..bases.memory import Memory
from ..bases.weights import Weight
from ..core.arrays import find_other_array
from ..core.basis import truncated_svd
from ..core.grouping import group_by
from ..core.lowrank import LowRank
from ..core.merging import inner_product
from ..core.precision import in_full_precision, working_dtype
from ..core.recompression import balance_factors
from ..errors import NonFiniteWeights, ShapeMismatch, UnsupportedFormat, WrongBase
from ..files.hashing import flatten_bytes
from ..moving.assembly import list_kernels
from ..moving.base_check import are_one_base
from ..reports.module_report import ModuleReport
from ..verbs.option_keywords import resolve_options, takes_options
from ..verbs.options import FormatLike
from ..verbs.output_paths import check_output
from ..verbs.result import Transfer, as_dry_run, save_result
from ..verbs.rows import describe_difference, outline_difference
from ..version import __version__
from .bake_report import BakedModule, sum_modules
from .extract_options import DEFAULT_EXTRACTION, ExtractOptions
from .made_report import MadeReport

_MOST_NUMBERS = 1 << 22  # of a table, subtracted at a time
_TOO_SMALL = "differs by less than 1e-20, which no LoRA in half precision holds"


@takes_options
def extract(
    base: BaseLike,
    tuned: BaseLike,
    options: ExtractOptions = DEFAULT_EXTRACTION,
    *,
    out: str | PathLike[str] | None = None,
    dry_run: bool = False,
    **changes: Any,
) -> Transfer:
    """Extracts the LoRA that makes one base of another: a fine-tune's, or a few-step sibling's.

    Modules are read, subtracted and cut by `truncated_svd` a few at a time.

    Args:
        base: the base that the LoRA is to be used with, as `transfer` takes its bases.
        tuned: the same model after training, likewise.
        options: how to extract it.
        out: a file to write, or a folder for format "peft"; checked before any work.
        dry_run: report what would be extracted, from headers alone.
        **changes: single options by name; they win over `options`.

    Returns:
        The LoRA in memory, and the report: the share of energy kept in each module and in all.

    Raises:
        ShapeMismatch: the bases have other modules or shapes; the first is named.
        WrongBase: they are one model.
        UnsupportedFormat: one of them cannot be read, or `format` cannot hold the LoRA.
        NonFiniteWeights: NaN or Inf in a weight, named.
        TooLittleMemory: max_memory is below what the largest weight needs.
        OutputExists: something has the name of `out`.
        OutputError: `out` cannot be written, or is an input.
    """
    options = resolve_options(options, changes)
    old, new = open_base(base), open_base(tuned)
    if dry_run:
        pair = _Difference(old, new, options)
        pair.check()
        return as_dry_run(pair.report(dry_run=True))
    if out is None:
        done = _run(old, new, options)
        foreign = find_other_array(base.values()) if isinstance(base, Mapping) else None
        return replace(done, adapter=replace(done.adapter, foreign=foreign))
    check_output(out, [*old.files, *new.files], options.overwrite, options.format)
    return save_result(_run(old, new, options, hashed=True), Path(out), options.overwrite)


@in_full_precision
def _run(base: Base, tuned: Base, options: ExtractOptions, hashed: bool = False) -> Transfer:
    pair = _Difference(base, tuned, options)
    pair.check()
    started = time.perf_counter()
    pair.subtract_matrices()
    pair.subtract_others()
    seconds = {"extract": time.perf_counter() - started}
    adapter = replace(pair.outline(pair.updates), vectors=pair.vectors)
    if hashed:
        adapter = replace(adapter, metadata=pair.describe())
    report = pair.report(
        vectors=len(pair.vectors),
        left_out=pair.left_out,
        seconds=seconds,
        provenance=read_provenance(adapter.metadata),
    )
    inputs = [*base.files, *tuned.files]
    return Transfer(adapter, report, inputs, pair.format, options.stored_dtype)


@dataclass
class _Difference:
    """Two bases and what was found between them."""

    base: Base  # the one that the LoRA is for
    tuned: Base  # the other
    options: ExtractOptions  # how it is extracted
    rows: dict[str, ModuleReport] = field(default_factory=dict)  # module -> its row of the report
    updates: dict[str, LowRank] = field(default_factory=dict)  # module -> its update
    vectors: dict[str, Tensor] = field(default_factory=dict)  # name -> difference
    left_out: dict[str, str] = field(default_factory=dict)  # vector -> why it is not in the result
    rounding: list[BakedModule] = field(default_factory=list)  # what is left of each update

    @property
    def format(self) -> FormatLike:
        return self.options.format or cast(FormatLike, self.outline({}).format)

    def check(self) -> None:
        """Refuses what can be refused by headers, and writes the row of every module."""
        self._check_bases()
        shared = [name for name in self.base.shapes if name in self.tuned.shapes]
        if not shared:
            raise ShapeMismatch(f"{self.base.name} and {self.tuned.name} share no module")
        for name in shared:
            shape = matrix_shape(self.base.shapes[name])
            what = explain_no_layer(self.base, name)
            reason = f"no LoRA's layer: {what}" if what else None
            self.rows[name] = outline_difference(name, shape, self._most_columns(shape), reason)
        for name in (*self.base.shapes, *self.tuned.shapes):
            if name not in self.rows:
                only = self.base if name in self.base.shapes else self.tuned
                reason = f"only {only.name} holds this text encoder"
                shape = matrix_shape(only.shapes[name])
                self.rows[name] = outline_difference(name, shape, 0, reason)
        zero = torch.zeros(())
        hollow = {
            name: LowRank(zero.expand(row.shape[0], 1), zero.expand(1, row.shape[1]))
            for name, row in self.rows.items()
            if row.status == "mapped"
        }
        adapters.check_format(self.outline(hollow), self.format)
        shapes = {(row.shape[0], row.shape[1]) for row in self.rows.values()}
        self.memory.check(shapes, "comparison", self._count_result_bytes())

    @property
    def memory(self) -> Memory:
        return Memory(self.options.memory_limit, self.options.rank, self.options.device)

    def _count_result_bytes(self) -> int:
        return sum(4 * row.rank_out * sum(row.shape) for row in self.rows.values())

    def _most_columns(self, shape: tuple[int, int]) -> int:
        """Columns of a module's update at most."""
        rank = self.options.rank
        return min(shape) if isinstance(rank, float) else min(*shape, rank)

    def _check_bases(self) -> None:
        base, tuned = self.base, self.tuned
        if are_one_base(base, tuned):
            raise WrongBase(
                f"{base.name} and {tuned.name} are the same model: there is nothing to extract"
            )
        for one, other in ((base, tuned), (tuned, base)):
            for name, shape in one.shapes.items():
                other_shape = other.shapes.get(name)
                if other_shape is None and is_in_text_encoder(name):
                    continue
                if other_shape is None or matrix_shape(other_shape) != matrix_shape(shape):
                    what = f"has it as {list(other_shape)}" if other_shape else "has no such module"
                    raise ShapeMismatch(
                        f"{base.name} and {tuned.name} are not of one architecture, so there is "
                        f"no difference between them: {name} is {list(shape)} in {one.name}, and "
                        f"{other.name} {what}"
                    )

    def subtract_matrices(self) -> None:
        """Extracts every module, a few of equal shape at a time."""
        mapped = [row for row in self.rows.values() if row.status == "mapped"]
        done = 0
        for chunk in self._list_chunks(mapped):
            self.options.report_progress(done, len(mapped), chunk[0].source)
            for row, update in zip(chunk, self._extract_stack(chunk), strict=True):
                self.rows[row.source] = update
            done += len(chunk)
        self.updates = {name: self.updates[name] for name in self.rows if name in self.updates}
        self.options.report_progress(done, len(mapped), "done")

    def _list_chunks(self, rows: Iterable[ModuleReport]) -> Iterator[list[ModuleReport]]:
        """Modules of one shape, as many as are worked on at a time."""
        by_shape = group_by(rows, lambda row: (row.shape[0], row.shape[1]))
        room = self.memory.room(self._count_result_bytes())
        for shape, members in by_shape.items():
            count = room.stack(shape, "comparison")
            if self.options.device in (None, "cpu"):
                count = min(count, torch.get_num_threads())
            yield from (members[i : i + count] for i in range(0, len(members), count))

    def _extract_stack(self, rows: list[ModuleReport]) -> list[ModuleReport]:
        """Fills the rows of modules of one shape, and keeps their updates."""
        names = [row.source for row in rows]
        difference, sizes = self._subtract(names)
        norms = _measure_norms(difference)
        if not all(map(math.isfinite, norms)):
            for base in (self.base, self.tuned):
                check_finite(base, names)  # says which tensor, and where in it
        moved = [i for i, norm in enumerate(norms) if norm > 0]
        rank = self.options.rank
        columns = rank if isinstance(rank, float) else rows[0].rank_out
        basis = truncated_svd(difference[moved], columns) if moved else None
        filled = []
        for i, row in enumerate(rows):
            if basis is None or i not in moved:
                why = _TOO_SMALL if difference[i].any() else "equal in both bases"
                shape = rows[0].shape[0], rows[0].shape[1]
                filled.append(outline_difference(row.source, shape, 0, why))
                continue
            own = basis[moved.index(i)]
            up, down = balance_factors(own.U, own.S, own.V)
            update = LowRank(up.float().cpu(), down.float().cpu())
            self.updates[row.source] = update
            self.rounding.append(_measure_rounding(update, self.options.stored_dtype))
            up, down = (x.to(self.options.stored_dtype).to(difference.dtype) for x in (up, down))
            (lost,) = _measure_norms((difference[i] - up @ down)[None])
            bound = None if own.ok else own.bound.item()
            measured = sizes[i], norms[i], lost
            filled.append(describe_difference(row, update.rank, measured, bound))
        return filled

    def _subtract(self, names: list[str]) -> tuple[Tensor, list[float]]:
        """Returns W_tuned − W_base as a stack [b, m, n], and each ‖W_base‖."""
        device = self.options.device or "cpu"
        stacks = [stack_weights([b.read(n) for n in names]) for b in (self.tuned, self.base)]
        dtype = working_dtype(*(stack.dtype for stack in stacks))
        new, old = (stack.flatten(2).to(device, dtype) for stack in stacks)
        return new - old, _measure_norms(old)

    def subtract_others(self) -> None:
        """Keeps differences of biases and norms that the format holds.

        All others are left out: named with the norm of their difference, which counts in shares.
        """
        (of_base, foreign), (of_tuned, others) = self.base.others, self.tuned.others
        no_layers = {n: row.reason for n, row in self.rows.items() if row.status == "skipped"}
        for name in dict.fromkeys((*of_base, *of_tuned)):
            both = name in of_base and name in of_tuned
            if not both or of_base[name].shape != of_tuned[name].shape:
                only = self.base if name in of_base else self.tuned
                self.left_out[name] = f"only {only.name} holds it, or in another shape"
            elif norm := self._measure(name, of_base[name], of_tuned[name]):
                reason = self._refuse_vector(name, of_base[name])
                if not reason:
                    self.vectors[name] = _subtract(of_base[name], of_tuned[name]).float()
                self._record_other(name, of_base[name].shape, norm, reason)
        old, new = self.base.weights, self.tuned.weights
        for name, reason in no_layers.items():
            if name in old and name in new:
                norm = self._measure(name, old[name], new[name])
                self._record_other(name, old[name].shape, norm, reason)
        changed = [k for k in foreign if k in others and not _are_equal(foreign[k], others[k])]
        for part, count in Counter(key.partition(".")[0] for key in changed).items():
            what = "another model in the file, which no LoRA of this one changes"
            self.left_out[part] = f"{what}; {count} of its tensors differ"

    def _measure(self, name: str, base: Weight, tuned: Weight) -> float:
        """Returns the norm of the difference of two tensors, some rows at a time."""
        rows = base.shape[0] if base.shape else 0
        step = max(1, _MOST_NUMBERS * rows // max(1, math.prod(base.shape)))
        squares = [
            _subtract(base, tuned, start, min(start + step, rows)).square().sum().item()
            for start in range(0, max(1, rows), step)
        ]
        if not math.isfinite(norm := math.sqrt(sum(squares))):
            raise NonFiniteWeights(
                f"{name} of {self.base.name} or of {self.tuned.name} holds NaN or Inf; the "
                "checkpoint is damaged"
            )
        return norm

    def _record_other(self, name: str, shape: Sequence[int], norm: float, reason: str) -> None:
        """Writes the row of a tensor beside the layers."""
        size = matrix_shape(tuple(shape) or (1,))
        self.rows[name] = outline_difference(name, size, 0, reason, norm**2)
        if reason and norm:
            self.left_out[name] = f"{reason}; the norm of its difference is {norm:.3g}"

    def _refuse_vector(self, name: str, vector: Weight) -> str:
        """Explains why the format cannot hold a vector; "" if it can."""
        module, _, tensor = name.rpartition(".")
        if tensor not in ("bias", "weight") or len(vector.shape) != 1:
            return "no format has a key for it"
        updates = {module: self.updates[module]} if module in self.updates else {}
        with_vector = replace(self.outline(updates), vectors={name: torch.zeros(vector.shape)})
        try:
            adapters.check_format(with_vector, self.format)
        except (UnsupportedFormat, ShapeMismatch):
            return "the format has no key for it"
        return ""

    def outline(self, updates: dict[str, LowRank]) -> Adapter:
        """Outlines the LoRA of some updates, without vectors and header."""
        kernels, dtype = list_kernels(updates, self.base), self.options.stored_dtype
        model = self.base.model
        return Adapter(updates, kernels, format=self._usual_format, origin=model, dtype=dtype)

    @cached_property
    def _usual_format(self) -> str:
        """What most programs read for the base."""
        family = known_families().get(self.base.family or "")
        if any(find_component(name) == "unet" for name in self.base.shapes):
            return "kohya"
        if family is None:
            return "diffusers"
        return "comfy" if "comfy" in family.spellings else next(iter(family.spellings))

    def describe(self) -> dict[str, str]:
        """Writes the header: base and making of the LoRA."""
        base, tuned = self.base, self.tuned
        notes = {
            "version": __version__,
            "method": "extract",
            "rank": str(self.options.out_rank),
            "extracted_from": tuned.name,
            "extracted_from_hash": name_base(tuned),
        }
        metadata = rewrite_metadata(
            {"modelspec.title": f"{Path(tuned.name).stem} as a LoRA"},
            target_name=base.name,
            target_layout=base.layout,
            target_short_hash=compute_short_hash(base),
            provenance={key: text for key, text in notes.items() if text},
        )
        del metadata["modelspec.merged_from"]
        metadata["ss_training_comment"] = f"extracted from {tuned.name} by prolora"
        return metadata

    def report(self, **facts: Any) -> MadeReport:
        base, tuned = (x.name.removesuffix(".safetensors") for x in (self.base, self.tuned))
        fields = {"modules": tuple(self.rows.values())} | facts
        return MadeReport(
            method="extract",
            original=f"the difference between {base} and {tuned}",
            advice=f"Next: load it with {base}, at strength 1.",
            rounding=sum_modules(self.rounding) if self.rounding else None,
            source=self.base.name,
            target=self.tuned.name,
            quantised=list_quantised(self.base, self.tuned),
            **fields,
        )


def _measure_rounding(update: LowRank, dtype: torch.dtype) -> BakedModule:
    """Compares an update with its factors rounded to a type."""
    written = update.to(dtype)
    energy, product = inner_product(update, update), inner_product(update, written)
    wrong = inner_product(written, written) - 2 * product + energy
    return BakedModule("", energy, product, max(0.0, wrong))


def _subtract(base: Weight, tuned: Weight, start: int = 0, stop: int = 0) -> Tensor:
    """Returns the difference of two tensors, or of rows [start, stop) of them, in float64."""
    new, old = ((w.read_rows(start, stop) if stop else w.read()).cpu() for w in (tuned, base))
    return new.double() - old.double()


def _are_equal(one: Weight, other: Weight) -> bool:
    """Compares the bytes of two tensors."""
    same = one.shape == other.shape and one.dtype == other.dtype
    return same and torch.equal(flatten_bytes(one.read().cpu()), flatten_bytes(other.read().cpu()))


def _measure_norms(stack: Tensor) -> list[float]:
    """Measures ‖·‖ of each matrix [b, m, n], in float64 across rows: as good, and fast."""
    rows = torch.linalg.vector_norm(stack, dim=-1).double()
    return cast(list[float], torch.linalg.vector_norm(rows, dim=-1).tolist())
