"""Several LoRAs as one, each moved from its own base first."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.formats.metadata import combine_metadata, rewrite_metadata
from ..adapters.formats.moves import MERGE, read_moves, read_provenance
from ..adapters.hub_adapters import locate_adapter
from ..adapters.lora import Lora
from ..adapters.training_words import read_training_words
from ..bases import Base, BaseLike, open_base
from ..bases.identity import compute_hint, compute_short_hash
from ..core.lowrank import LowRank
from ..core.merging import inner_product, merge_updates, merge_vectors
from ..core.precision import in_full_precision
from ..errors import AlreadyMoved, InvalidOption, OutputError, ProLoRAError, ShapeMismatch
from ..moving.base_check import are_one_base, explain_misfit, guess_lora_families
from ..moving.base_pair import BasePair, prefix_notes
from ..moving.block_weights import BlockWeights, find_factors, weigh_adapter
from ..moving.file_budget import OutputForm, describe_cuts
from ..moving.moved_before import check_moved_before
from ..moving.option_keywords import settle_options, takes_options
from ..moving.options import LoraLike
from ..moving.out_rank import cut_rank
from ..moving.output_paths import check_name, check_output
from ..moving.result import Transfer, pack_result, save_result
from ..moving.rows import (
    describe_conversion,
    describe_left_out,
    list_tensors_left_out,
    list_unread_modules,
    scale_energies,
)
from ..reports.module_report import LEFT_OUT, ModuleReport
from ..reports.module_tables import write_shape
from ..version import __version__
from .convert import read_plain
from .merge_inputs import check_experts, check_families, name_loras
from .merge_options import DEFAULT_MERGE, MergeOptions
from .merge_report import MergedPart, MergeReport, ModuleOverlap, relate_updates

Sources = Sequence[BaseLike | None]
"""The base of each LoRA, in their order; None where it is that of the result."""


@takes_options
def merge(
    loras: Sequence[LoraLike],
    target: BaseLike | None = None,
    sources: Sources = (),
    options: MergeOptions = DEFAULT_MERGE,
    *,
    out: str | PathLike[str] | None = None,
    **changes: Any,
) -> Transfer:
    """Merges LoRAs into one.

    Modules that only one of them has are kept. A LoRA with a base of its own is moved to `target`
    first, as `transfer` does it by default.

    Args:
        loras: two or more, as `transfer` takes them.
        target: the base that the result is for. Needed where a LoRA has another one, and where an
            update depends on its weights (DoRA, GLoRA, OFT).
        sources: the base of each LoRA, in their order, or none of them; None for one that was
            trained on `target`.
        options: how to merge them.
        out: a file to write, or a folder for format "peft"; checked before any work.
        **changes: single options by name; they win over `options`.

    Returns:
        The LoRA in memory, and the report: what of each LoRA is in it, and where they overlap.

    Raises:
        InvalidOption: fewer than two LoRAs, or not one strength or base for each.
        WrongBase: the LoRAs are for different models, and their bases are not given; they are for
            both experts of one, and none is moved; or a LoRA is of `target` and not of its source.
        ShapeMismatch: two LoRAs have a module in different shapes.
        UnsupportedFormat: a file that cannot be read exactly, one that needs its base and has none,
            or a result that `format` cannot hold.
        NonFiniteWeights: NaN or Inf, named.
        OutputExists: something has the name of `out`.
        OutputError: `out` cannot be written, or is an input; out_rank is a size that one column a
            module exceeds.
        ProLoRAError: what `transfer` raises, of a LoRA that is moved.
    """
    options = settle_options(options, changes)
    if out is None:
        return _Merge.open(loras, target, sources, options).run(hashed=False)
    options = options.for_file()
    job = _Merge.open(loras, target, sources, options)
    check_name(out)
    if os.path.isdir(out) and not job.writes_folder:
        raise OutputError(f"{out}: is a folder; name the file that is to be written in it")
    check_output(out, job.inputs, options.overwrite, options.format)
    return save_result(job.run(hashed=True), Path(out), options.overwrite)


@dataclass
class _Merge:
    """LoRAs on their way to be one."""

    loras: list[LoraLike]  # as they were given
    target: Base | None  # the base of the result
    sources: list[Base | None]  # the base of each LoRA
    options: MergeOptions  # how they are merged
    names: list[str]  # of each LoRA in reports
    strengths: list[float]  # the factor on each
    # The base that each is moved from; None for one that is of the target already
    origins: list[Base | None] = field(default_factory=list)
    parts: list[Adapter] = field(default_factory=list)  # each LoRA, on the base of the result
    facts: list[MergedPart] = field(default_factory=list)  # what is known of each
    behind: list[ModuleReport] = field(default_factory=list)  # the rows of modules that stay behind
    left_out: dict[str, str] = field(default_factory=dict)  # tensor -> why it is not in the result
    unread: list[str] = field(default_factory=list)  # modules whose update cannot be read

    @classmethod
    def open(
        cls,
        loras: Sequence[LoraLike],
        target: BaseLike | None,
        sources: Sources,
        options: MergeOptions,
    ) -> _Merge:
        """Checks the numbers of all, and opens the bases."""
        if not isinstance(loras, Sequence) or isinstance(loras, str) or len(loras) < 2:
            raise InvalidOption("a merge takes two LoRAs or more")
        if isinstance(loras[0], Mapping) and hasattr(loras[1], "to_dict"):
            raise InvalidOption(
                "(state dict, peft.LoraConfig) is one LoRA, and a merge takes two or more: give a "
                "list with this pair in it"
            )
        if not isinstance(sources, Sequence) or isinstance(sources, str):
            raise InvalidOption("`sources` must be a base or None for each LoRA, or none at all")
        count, strengths = len(loras), options.strengths
        for name, given, hint in (
            ("strengths", strengths, "give one for each"),
            ("blocks", options.blocks, "separate those of each LoRA by ;"),
            ("sources", sources or None, "give the base of each in their order, or none at all"),
        ):
            if given is not None and len(given) != count:
                raise InvalidOption(
                    f"`{name}` is for {len(given)} LoRAs, and there are {count}; {hint}"
                )
        if target is None and any(source is not None for source in sources):
            raise InvalidOption(
                "LoRAs have bases of their own, and `target` is missing: which base is the result "
                "for?"
            )
        return cls(
            list(loras),
            None if target is None else open_base(target),
            [None if s is None else open_base(s) for s in sources or [None] * count],
            options,
            name_loras(loras),
            list(strengths or [1.0] * count),
        )

    @property
    def writes_folder(self) -> bool:
        """Whether the result can be a PEFT folder."""
        return self.options.format == "peft" or any(path.is_dir() for path in self._list_files())

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read."""
        bases = [base for base in (self.target, *self.sources) if base is not None]
        return [*self._list_files(), *(file for base in bases for file in base.files)]

    def _list_files(self) -> list[Path]:
        """Returns the paths of the LoRAs that are not in memory."""
        return [locate_adapter(lora) for lora in self.loras if isinstance(lora, str | PathLike)]

    @in_full_precision
    def run(self, *, hashed: bool) -> Transfer:
        """Reads, moves and merges; `hashed` also writes a header, which reads the base's bytes."""
        names = self.names
        if self.target is None:
            check_families(names, self.loras)
        self._check_experts()
        for i in range(len(self.loras)):
            self._read(i)
        self._check_modules()
        outline, form = self._outline(), OutputForm.of(self.options)
        form.check(outline)
        dtype = form.dtype or outline.dtype
        updates: dict[str, LowRank] = {}
        rows: list[ModuleReport] = []
        for i, name in enumerate(outline.updates):
            if self.options.progress:
                self.options.progress(i, len(outline.updates), name)
            updates[name], row = self._merge_module(name, dtype)
            rows.append(row)
        merged = outline.with_updates(updates)
        if hashed:
            merged = replace(merged, metadata=self._describe(merged.metadata))
        fitted = form.fit(merged)
        told = describe_cuts(rows, merged, fitted)
        report = self._report(told, fitted, merged, dtype)
        return pack_result(fitted, merged, report, self.inputs, form)

    def _check_experts(self) -> None:
        """Finds the LoRAs to move; refuses unmoved ones of the other expert."""
        target = self.target
        self.origins = [
            None if s is None or target is None or are_one_base(s, target) else s
            for s in self.sources
        ]
        known = list(zip(self.names, self.loras, self.origins, strict=True))
        kept = {name: lora for name, lora, origin in known if origin is None}
        check_experts([*kept, *([target.name] if target else [])], list(kept.values()))
        for name, lora, origin in known:
            if origin is not None:
                check_experts([name, origin.name], [lora])

    def _read(self, i: int) -> None:
        """Reads a LoRA, and moves it where it has another base than the result."""
        lora, source, name, moved_from = self.loras[i], self.origins[i], self.names[i], ""
        if self.target is None or source is None:
            if self.target is not None:
                self._check_belongs(lora, name, self.target)
            adapter = read_plain(lora, self.target)
            behind = list_unread_modules(adapter)
            self.unread += adapter.unread
        else:
            how = self.options.for_moving()
            done = BasePair.open(source, self.target, how).transfer(lora, hashed=False)
            adapter, moved_from = done.adapter, source.name
            behind = [row for row in done.report.modules if row.status != "mapped"]
            self.unread += done.report.unread
            self.left_out |= {f"{name}: {x}": why for x, why in done.report.left_out.items()}
        blocks = self.options.blocks[i] if self.options.blocks is not None else None
        factors = find_factors(blocks, adapter, self.target)
        gone = [name for name in adapter.updates if factors.get(name) == 0]
        square = self.strengths[i] ** 2
        behind = scale_energies(behind, square)
        lost = sum(row.energy for row in behind)
        silenced = [describe_left_out(n, adapter.updates[n]) for n in gone]
        self.behind += [*behind, *scale_energies(silenced, square)]
        silent = [name for name in adapter.vectors if factors.get(name.rpartition(".")[0]) == 0]
        self.left_out |= {f"{name}: {vector}": LEFT_OUT for vector in silent}
        adapter = weigh_adapter(adapter, factors) if factors else adapter
        self.parts.append(adapter)
        moves = read_moves(adapter.metadata)
        stated = moves[-1].target if moves else adapter.metadata.get("ss_sd_model_name", "")
        digest = Lora.open(lora).digest if isinstance(lora, str | PathLike) else ""
        fact = MergedPart(
            name,
            self.strengths[i],
            "" if blocks is None else str(BlockWeights.read(blocks)),
            trigger=read_training_words(adapter.metadata).trigger,
            moved_from=moved_from,
            stated_base="" if moved_from else Path(stated).name,
            digest=f"sha256:{digest}" if digest else "",
            modules=len(adapter.updates),
            energy=lost,
            placeless=lost,
        )
        self.facts.append(fact)

    def _check_belongs(self, lora: LoraLike, name: str, target: Base) -> None:
        """Refuses a LoRA of another base than that of the result, or moved to another."""
        wrong: ProLoRAError | None = explain_misfit(lora, target)
        if wrong is None:
            try:
                check_moved_before(lora, target, self.options.for_moving())
                return
            except AlreadyMoved as error:
                wrong = error
        why = str(wrong).partition(";")[0] if isinstance(wrong, AlreadyMoved) else str(wrong)
        raise type(wrong)(
            f"{name} is not a LoRA of the base of the result; give its own base, and it is moved "
            f"first ({why})"
        ) from wrong

    def _check_modules(self) -> None:
        """Refuses a module that two LoRAs have in different shapes."""
        known: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, part in zip(self.names, self.parts, strict=True):
            shapes = {m: (*u.shape, *part.kernels.get(m, ())) for m, u in part.updates.items()}
            shapes |= {vector: tuple(tensor.shape) for vector, tensor in part.vectors.items()}
            for held, shape in shapes.items():
                other, theirs = known.setdefault(held, (name, shape))
                if theirs != shape:
                    raise ShapeMismatch(
                        f"{held} is {write_shape(shape)} in {name} and {write_shape(theirs)} in "
                        f"{other}: these LoRAs are for bases of different sizes"
                    )

    def _outline(self) -> Adapter:
        """Outlines the result: its vectors, and zeros for updates."""
        first, zero = self.parts[0], torch.zeros(())
        updates: dict[str, LowRank] = {}
        kernels: dict[str, tuple[int, ...]] = {}
        for part in self.parts:
            kernels |= part.kernels
            for module, update in part.updates.items():
                ranks = [p.updates[module].rank for p in self.parts if module in p.updates]
                (m, n), rank = update.shape, sum(ranks)
                rank = min(m, n, rank) if len(ranks) > 1 else rank
                updates[module] = LowRank(zero.expand(m, rank), zero.expand(rank, n))
        return Adapter(
            updates,
            kernels,
            vectors=self._merge_vectors() if self.options.vectors == "copy" else {},
            format=first.format,
            spelling=first.spelling,
            family=self._choose_family(updates),
            style=next((p.style for p in self.parts if p.style), None),
            dtype=reduce(torch.promote_types, map(_stored_dtype, self.parts)),
            metadata=combine_metadata(
                {n: part.metadata for n, part in zip(self.names, self.parts, strict=True)}
            ),
        )

    def _choose_family(self, updates: Mapping[str, LowRank]) -> str | None:
        """Returns the family of the result's names, common to all modules."""
        if self.target is not None and self.target.family:
            return self.target.family
        able, _ = guess_lora_families(Adapter(dict(updates), metadata=self.parts[0].metadata))
        told = [part.family for part in self.parts if part.family]
        return next((family for family in told if family in able), told[0] if told else None)

    def _merge_vectors(self) -> dict[str, Tensor]:
        """Differences of biases and norms."""
        found: dict[str, list[Tensor]] = {}
        for part, strength in zip(self.parts, self.strengths, strict=True):
            for name, vector in part.vectors.items():
                found.setdefault(name, []).append(strength * vector)
        return {name: merge_vectors(some, self.options.method) for name, some in found.items()}

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
        energies, kept = [fact.energy for fact in self.facts], [0.0] * len(self.parts)
        overlaps: list[ModuleOverlap] = []
        for module, update in merged.updates.items():
            parts, written = self._list_updates(module), update.to(dtype)
            overlaps += relate_updates(module, parts)
            for i, part in parts.items():
                energies[i] += inner_product(part, part)
                kept[i] += inner_product(part, written)
        known = zip(self.facts, energies, kept, strict=True)
        told = (
            replace(f, energy=e, kept=k / e, placeless=f.placeless / e) if e else replace(f, kept=1)
            for f, e, k in known
        )
        return tuple(told), tuple(overlaps)

    def _describe(self, combined: dict[str, str]) -> dict[str, str]:
        """Writes the header: the merged LoRAs and how; reads all of the target.

        `combined` are the headers of all as one.
        """
        target = self.target
        told = ("name", "strength", "blocks", "trigger", "moved_from", "digest")
        merged = [{k: v for k in told if (v := getattr(fact, k)) != ""} for fact in self.facts]
        notes = {
            "version": __version__,
            "method": MERGE,
            "merge_method": self.options.method,
            "rank": str(self.options.out_rank),
            "merged": json.dumps(merged, ensure_ascii=False),
        }
        if target is None:
            return combined | prefix_notes(notes)
        bases = dict.fromkeys(fact.moved_from for fact in self.facts if fact.moved_from)
        notes |= {"target": target.name, "target_hash": compute_hint(target)}
        notes["source"] = ", ".join(bases) or target.name
        rewritten = rewrite_metadata(
            combined,
            target_name=target.name,
            target_layout=target.layout,
            target_short_hash=compute_short_hash(target),
            provenance={key: text for key, text in notes.items() if text},
        )
        kept = ("modelspec.merged_from", "ss_training_comment")
        return rewritten | {key: combined[key] for key in kept}

    def _report(
        self, rows: Sequence[ModuleReport], fitted: Adapter, result: Adapter, dtype: torch.dtype
    ) -> MergeReport:
        """Reports what became of each LoRA; `fitted` is `result`, cut to the size of a file."""
        parts, overlaps = self._measure(fitted, dtype)
        left_out = dict(self.left_out)
        kept_energy: dict[str, float] = {}
        for name, part in zip(self.names, self.parts, strict=True):
            for tensor, why in list_tensors_left_out(part).items():
                left_out[f"{name}: {tensor}"] = why
            for vector in part.vectors.keys() - result.vectors.keys():
                left_out[f"{name}: {vector}"] = "left out as asked"
            for module, share in part.kept_energy.items():
                kept_energy[module] = min(share, kept_energy.get(module, 1.0))
        names = " + ".join(self.names)
        return MergeReport(
            method=MERGE,
            done="merged",
            original=names,
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
    """Returns a LoRA's dtype; for eight bits the sixteen that hold them.

    Eight bits are not written.
    """
    return part.dtype if part.dtype.itemsize > 1 else torch.float16
