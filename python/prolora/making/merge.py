"""Several LoRAs of one base as one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import adapters
from ..adapters.adapter import Adapter
from ..adapters.contents import parse_contents
from ..adapters.formats.metadata import combine_metadata, rewrite_metadata
from ..adapters.formats.moves import MERGE, PREFIX, StatedBase, read_provenance
from ..adapters.lora import Lora
from ..adapters.trigger_words import read_trigger_words
from ..architectures.identify import Model
from ..architectures.modules import write_shape
from ..bases import Base, BaseLike, open_base
from ..bases.identity import compute_short_hash, name_base
from ..core.arrays import find_other_array
from ..core.lowrank import LowRank
from ..core.merging import inner_product, merge_updates, merge_vectors
from ..core.precision import in_full_precision
from ..errors import AlreadyMoved, InvalidOption, OutputError, ShapeMismatch, UnsupportedFormat
from ..moving.base_check import check_moved_before
from ..moving.lazy_bases import narrow_base
from ..moving.ledger import list_tensors_left_out
from ..reports.module_report import LEFT_OUT, ModuleReport, list_unread_modules
from ..verbs.block_weights import BlockWeights, find_factors, scale_adapter
from ..verbs.option_keywords import resolve_options, takes_options
from ..verbs.options import LoraLike, cut_rank, read_dtype, use_lora
from ..verbs.output_paths import check_name, check_output
from ..verbs.result import Transfer, list_inputs, save_result
from ..verbs.rows import describe_conversion, describe_left_out
from ..version import __version__
from .convert import read_plain
from .merge_inputs import check_experts, check_families, name_loras
from .merge_options import DEFAULT_MERGE, MergeOptions
from .merge_report import MergedPart, MergeReport, ModuleOverlap, relate_updates


def check_merged(loras: Sequence[LoraLike]) -> None:
    """Refuses anything but two LoRAs or more."""
    if not isinstance(loras, Sequence) or len(loras) < 2:
        raise InvalidOption("a merge takes two LoRAs or more")
    if isinstance(loras[0], Mapping) and hasattr(loras[1], "to_dict"):
        raise InvalidOption(
            "(state dict, peft.LoraConfig) is one LoRA, and a merge takes two or more: give a "
            "list with this pair in it"
        )


@takes_options
def merge(
    loras: Sequence[LoraLike],
    target: BaseLike | None = None,
    options: MergeOptions = DEFAULT_MERGE,
    *,
    out: str | PathLike[str] | None = None,
    **changes: Any,
) -> Transfer:
    """Merges LoRAs into one.

    Modules that only one of them has are kept. A LoRA of another base is moved by `transfer` first.

    Args:
        loras: two or more, as `transfer` takes them.
        target: the base that all are for. Needed where an update depends on its weights (DoRA,
            GLoRA, OFT).
        options: how to merge them.
        out: a file to write, or a folder for format "peft"; checked before any work.
        **changes: single options by name; they win over `options`.

    Returns:
        The LoRA in memory, and the report: what of each LoRA is in it, and where they overlap.

    Raises:
        InvalidOption: fewer than two LoRAs, or not one strength for each.
        WrongBase: the LoRAs are for different models, or for both experts of one.
        ShapeMismatch: two LoRAs have a module in different shapes.
        UnsupportedFormat: a file that cannot be read exactly, one that needs its base and has none,
            or a result that `format` cannot hold.
        NonFiniteWeights: NaN or Inf, named.
        OutputExists: something has the name of `out`.
        OutputError: `out` cannot be written, or is an input.
    """
    options = resolve_options(options, changes)
    check_merged(loras)
    model = None if target is None else open_base(narrow_base(target, *loras))
    with ExitStack() as stack:
        opened = [stack.enter_context(use_lora(lora)) for lora in loras]
        if out is None:
            return _Merge.open(opened, model, options).run(hashed=False)
        options = options.for_file()
        job = _Merge.open(opened, model, options)
        check_name(out)
        to_folder = options.format == "peft" or any(path.is_dir() for path in job.inputs)
        if os.path.isdir(out) and not to_folder:
            raise OutputError(f"{out}: is a folder; name the file that is to be written in it")
        check_output(out, job.inputs, options.overwrite, options.format)
        return save_result(job.run(hashed=True), Path(out), options.overwrite)


@dataclass
class _Merge:
    """LoRAs on their way to be one."""

    loras: list[Lora | Adapter]
    target: Base | None  # the base of the result
    options: MergeOptions  # how they are merged
    names: list[str]  # of each LoRA in reports
    strengths: list[float]  # the factor on each
    parts: list[Adapter] = field(default_factory=list)  # each LoRA
    facts: list[MergedPart] = field(default_factory=list)  # what is known of each
    behind: list[ModuleReport] = field(default_factory=list)  # the rows of modules that stay behind
    left_out: dict[str, str] = field(default_factory=dict)  # tensor -> why it is not in the result
    unread: list[str] = field(default_factory=list)  # modules whose update cannot be read

    @classmethod
    def open(
        cls, loras: Sequence[Lora | Adapter], target: Base | None, options: MergeOptions
    ) -> _Merge:
        options.check_count(len(loras))
        strengths = list(options.strengths or [1.0] * len(loras))
        return cls(list(loras), target, options, name_loras(loras), strengths)

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read, the LoRAs first."""
        files = [path for lora in self.loras for path in list_inputs(lora)]
        return [*files, *(self.target.files if self.target else [])]

    @in_full_precision
    def run(self, *, hashed: bool) -> Transfer:
        """Reads and merges; `hashed` also writes a header, which reads the base's bytes."""
        if self.target is None:
            check_families(self.names, self.loras)
        check_experts([*self.names, *([self.target.name] if self.target else [])], self.loras)
        for i in range(len(self.loras)):
            self._read(i)
        self._check_modules()
        outline, asked = self._outline(), read_dtype(self.options.dtype)
        if self.options.format is not None:
            adapters.check_format(outline, self.options.format)
        dtype = asked or outline.dtype
        updates: dict[str, LowRank] = {}
        rows: list[ModuleReport] = []
        for i, name in enumerate(outline.updates):
            self.options.report_progress(i, len(outline.updates), name)
            updates[name], row = self._merge_module(name, dtype)
            rows.append(row)
        merged = outline.with_updates(updates)
        if hashed:
            merged = replace(merged, metadata=self._describe(merged.metadata))
        report = self._report(rows, merged, dtype)
        return Transfer(merged, report, self.inputs, self.options.format or "auto", asked)

    def _read(self, i: int) -> None:
        lora, name = self.loras[i], self.names[i]
        try:
            if self.target is not None:
                check_moved_before(lora, self.target)
            adapter = read_plain(lora, self.target)
        except (AlreadyMoved, ShapeMismatch, UnsupportedFormat) as wrong:
            if self.target is None or not _is_readable(lora):
                raise
            why = str(wrong).partition(";")[0] if isinstance(wrong, AlreadyMoved) else str(wrong)
            raise type(wrong)(
                f"{name} is not a LoRA of the base of the result; move it there first: "
                f"`transfer()` ({why})"
            ) from wrong
        self.behind += list_unread_modules(adapter)
        self.unread += adapter.unread
        blocks = self.options.blocks[i] if self.options.blocks is not None else None
        factors = find_factors(blocks, adapter, self.target)
        for module, update in adapter.updates.items():
            if factors.get(module) == 0:
                gone = LowRank(update.up * self.strengths[i], update.down)
                self.behind.append(describe_left_out(module, gone))
        silent = [name for name in adapter.vectors if factors.get(name.rpartition(".")[0]) == 0]
        self.left_out |= {f"{name}: {vector}": LEFT_OUT for vector in silent}
        adapter = scale_adapter(adapter, factors) if factors else adapter
        self.parts.append(adapter)
        digest = lora.digest if isinstance(lora, Lora) else ""
        fact = MergedPart(
            name,
            self.strengths[i],
            "" if blocks is None else str(BlockWeights.read(blocks)),
            trigger=read_trigger_words(adapter.metadata).trigger,
            stated_base=StatedBase.read(adapter.metadata, adapter.model.version),
            digest=f"sha256:{digest}" if digest else "",
            modules=len(adapter.updates),
            unread=len(adapter.unread),
        )
        self.facts.append(fact)

    def _check_modules(self) -> None:
        """Refuses a module that two LoRAs have in different shapes."""
        owners: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, part in zip(self.names, self.parts, strict=True):
            shapes = {m: (*u.shape, *part.kernels.get(m, ())) for m, u in part.updates.items()}
            shapes |= {vector: tuple(tensor.shape) for vector, tensor in part.vectors.items()}
            for module, shape in shapes.items():
                other, expected = owners.setdefault(module, (name, shape))
                if expected != shape:
                    raise ShapeMismatch(
                        f"{module} is {write_shape(shape)} in {name} and "
                        f"{write_shape(expected)} in {other}: these LoRAs are for bases of "
                        "different sizes"
                    )

    def _outline(self) -> Adapter:
        """Outlines the result: its vectors, and zeros for updates."""
        first, zero = self.parts[0], torch.zeros(())
        updates: dict[str, LowRank] = {}
        kernels: dict[str, tuple[int, ...]] = {}
        for part in self.parts:
            kernels |= part.kernels
            for module, update in part.updates.items():
                if module in updates:
                    continue
                ranks = [p.updates[module].rank for p in self.parts if module in p.updates]
                (m, n), rank = update.shape, sum(ranks)
                rank = min(m, n, rank) if len(ranks) > 1 else rank
                updates[module] = LowRank(zero.expand(m, rank), zero.expand(rank, n))
        return Adapter(
            updates,
            kernels,
            vectors=self._merge_vectors(),
            format=first.format,
            spelling=first.spelling,
            origin=self._find_model(),
            foreign=find_other_array(
                part.foreign for part in self.parts if part.foreign is not None
            ),
            dtype=reduce(torch.promote_types, map(_stored_dtype, self.parts)),
            metadata=combine_metadata(
                {n: part.metadata for n, part in zip(self.names, self.parts, strict=True)}
            ),
        )

    def _find_model(self) -> Model:
        """Returns what the result is for: what all LoRAs can be for."""
        models = [part.model for part in self.parts]
        style = next((model.spelling for model in models if model.spelling), None)
        first = max(models, key=lambda model: bool(model.families))._replace(spelling=style)
        for other in models:
            first = first.shared_with(other)
        return first.of_base(self.target.model) if self.target else first

    def _merge_vectors(self) -> dict[str, Tensor]:
        """Differences of biases and norms."""
        vectors: dict[str, list[Tensor]] = {}
        for part, strength in zip(self.parts, self.strengths, strict=True):
            for name, vector in part.vectors.items():
                vectors.setdefault(name, []).append(strength * vector)
        return {name: merge_vectors(some, self.options.method) for name, some in vectors.items()}

    def _list_updates(self, module: str) -> dict[int, LowRank]:
        """Returns index of each LoRA with a module -> its update, strength included."""
        return {
            i: LowRank(update.up * self.strengths[i], update.down)
            for i, part in enumerate(self.parts)
            if (update := part.updates.get(module)) is not None
        }

    def _merge_module(self, module: str, dtype: torch.dtype) -> tuple[LowRank, ModuleReport]:
        """Returns the merged update of a module, cut as asked, and its row."""
        parts = self._list_updates(module)
        whole = merge_updates([*parts.values()], self.options.method)
        cut = cut_rank(whole, self.options.out_rank, sum(part.rank for part in parts.values()))
        of = " + ".join(self.names[i] for i in parts)
        return cut, describe_conversion(module, of, whole, cut.to(dtype), 1.0)

    def _measure(
        self, merged: Adapter, dtype: torch.dtype
    ) -> tuple[tuple[MergedPart, ...], tuple[ModuleOverlap, ...]]:
        """Measures what of each LoRA is in the result, and their overlap."""
        energies, products = [0.0] * len(self.parts), [0.0] * len(self.parts)
        overlaps: list[ModuleOverlap] = []
        for module, update in merged.updates.items():
            parts, written = self._list_updates(module), update.to(dtype).to(torch.float64)
            overlaps += relate_updates(module, parts)
            for i, part in parts.items():
                energies[i] += inner_product(part, part)
                products[i] += inner_product(part, written)
        rows = zip(self.facts, energies, products, strict=True)
        facts = (replace(f, energy=e, kept=k / e if e else 1) for f, e, k in rows)
        return tuple(facts), tuple(overlaps)

    def _describe(self, combined: dict[str, str]) -> dict[str, str]:
        """Writes the header: the merged LoRAs and how; reads all of the target.

        `combined` are the headers of all as one.
        """
        target = self.target
        names = ("name", "strength", "blocks", "trigger", "digest")
        merged = [{k: v for k in names if (v := getattr(fact, k)) != ""} for fact in self.facts]
        notes = {
            "version": __version__,
            "method": MERGE,
            "merge_method": self.options.method,
            "rank": str(self.options.out_rank),
            "merged": json.dumps(merged, ensure_ascii=False),
        }
        if target is None:
            return combined | {f"{PREFIX}{key}": text for key, text in notes.items()}
        notes |= {"target": target.name, "target_hash": name_base(target)}
        notes["source"] = target.name
        rewritten = rewrite_metadata(
            combined,
            target_name=target.name,
            target_layout=target.layout,
            target_short_hash=compute_short_hash(target),
            provenance={key: text for key, text in notes.items() if text},
        )
        keys = ("modelspec.merged_from", "ss_training_comment")
        return rewritten | {key: combined[key] for key in keys}

    def _report(
        self, rows: Sequence[ModuleReport], result: Adapter, dtype: torch.dtype
    ) -> MergeReport:
        parts, overlaps = self._measure(result, dtype)
        left_out = dict(self.left_out)
        kept_energy: dict[str, float] = {}
        for name, part in zip(self.names, self.parts, strict=True):
            for tensor, why in list_tensors_left_out(part).items():
                left_out[f"{name}: {tensor}"] = why
            for module, share in part.kept_energy.items():
                kept_energy[module] = min(share, kept_energy.get(module, 1.0))
        names, balanced = " + ".join(self.names), self.options.method == "balanced"
        return MergeReport(
            method=MERGE,
            original=f"the balanced sum of {names}" if balanced else names,
            balanced=balanced,
            source=names,
            target=self.target.name if self.target else "",
            modules=(*self.behind, *rows),
            blocks="; ".join(f"{f.name}: {f.blocks}" for f in self.facts if f.blocks),
            vectors=len(result.vectors),
            left_out=left_out,
            unread=tuple(dict.fromkeys(self.unread)),
            kept_energy=kept_energy,
            provenance=read_provenance(result.metadata),
            parts=parts,
            overlaps=overlaps,
        )


def _stored_dtype(part: Adapter) -> torch.dtype:
    """Returns a LoRA's dtype; for eight bits, which are not written, sixteen."""
    return part.dtype if part.dtype.itemsize > 1 else torch.float16


def _is_readable(lora: Lora | Adapter) -> bool:
    """Returns whether a LoRA is one, whatever base it is for."""
    try:
        return isinstance(lora, Adapter) or bool(parse_contents(lora))
    except (ShapeMismatch, UnsupportedFormat):
        return False
