"""Two bases, opened once for all LoRAs that move between them: plan, move, finish."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from os import PathLike

from .. import adapters
from ..adapters.formats.moves import read_provenance
from ..adapters.lora import Lora
from ..bases import Base
from ..bases.base import Progress
from ..bases.cache.basis_cache import BasisCache
from ..bases.identity import record_reads
from ..bases.memory import Memory
from ..comparison.block_matching import preview_match, resolve_match
from ..comparison.module_map import Match
from ..core.precision import in_full_precision
from ..errors import UnrelatedBases, WrongBase
from ..reports.report import Sentence
from ..verbs.batch import label_stage
from ..verbs.block_weights import find_factors, scale_adapter
from ..verbs.options import LoraLike, TransferOptions, read_dtype, use_lora
from ..verbs.result import Transfer, list_inputs, write_or_keep
from .assembly import assemble_adapter, build_metadata, build_report, carry_vectors
from .base_check import Depth, check_bases, read_lora, warn_of_smaller_size
from .ledger import Clock, Ledger, outline_rows
from .move_updates import decide_method, move_updates
from .plan import make_plan
from .transfer_report import TransferReport


@dataclass
class BasePair:
    """Two bases, and what was learnt of them."""

    source: Base  # the base that LoRAs were trained on
    target: Base  # the base that they move to
    options: TransferOptions  # how they move, as it was asked
    cache: BasisCache  # what is known of the weights
    memory: Memory = field(init=False)  # what may be in memory at a time
    # How modules are paired, with blocks recognised where only weights tell them; None until it is
    # asked for.
    match: Match | None = None

    @classmethod
    def open(
        cls, source: Base, target: Base, options: TransferOptions, *, dry_run: bool = False
    ) -> BasePair:
        """Opens the cache that the options name; a dry run makes no folder for it."""
        is_folder = options.cache is not None and os.path.isdir(os.fspath(options.cache))
        cache = BasisCache(options.cache if is_folder or not dry_run else None)
        return cls(source, target, options, cache)

    def __post_init__(self) -> None:
        """Looks at no weight yet."""
        options = self.options
        self.memory = Memory(options.memory_limit, options.rank, options.device)

    def match_blocks(self) -> Match:
        """Matches the blocks of the bases, once for all LoRAs; by weights where names say little.

        Raises:
            UnrelatedBases: no block was recognised.
            ProLoRAError: see `match_blocks` of the comparison.
        """
        if self.match is None:
            with record_reads(self.source, self.target, for_all=True):
                self.match = resolve_match(
                    self.options.match,
                    self.source,
                    self.target,
                    cache=self.cache,
                    device=self.options.device,
                    max_memory=self.options.max_memory,
                    progress=label_stage("matching", self.options.progress),
                )
        return self.match

    def plan(
        self,
        lora: LoraLike,
        depth: Depth = "updates",
        match: Match | None = None,
        *,
        weighed: bool = True,
    ) -> Ledger:
        """Reads a LoRA and plans where it goes; refuses all that needs no weights to be refused.

        A dry run ends here.

        `match` replaces the pair's own; `weighed` allows weights to be read, where they alone match
        blocks.

        Raises:
            ProLoRAError: see `prolora.transfer`.
        """
        options, clock = self.options, Clock()
        with clock("read"):
            warnings = check_bases(lora, self.source, self.target, options, self.cache)
            adapter = read_lora(lora, self.source, depth, self.target, keep_stored=True)
            warnings += [] if options.again else warn_of_smaller_size(adapter, self.source)
        with clock("match"):
            match = match or self.match or (self.match_blocks() if weighed else None)
            match = match or preview_match(options.match, self.source, self.target)
            plan = make_plan(adapter, self.source, self.target, match, options.text_encoder)
        ledger = Ledger(adapter, plan, self.source, self.target, options, lora, clock=clock)
        ledger.warnings = tuple(warnings)
        outline_rows(ledger, measured=depth != "updates")
        updates = {pair.target: adapter.updates[pair.source] for pair in plan.pairs}
        updates |= {name: adapter.updates[name] for name in plan.passed}
        outline = assemble_adapter(ledger, updates, carry_vectors(ledger)[0])
        if options.blocks is not None:
            ledger.block_factors = find_factors(options.blocks, outline, self.target)
        if options.format is not None:
            adapters.check_format(outline, options.format)
        # Modules left behind are measured by now, and their factors need no memory later.
        placed = {pair.source for pair in plan.pairs} | set(plan.passed)
        updates = {name: x for name, x in adapter.updates.items() if name in placed}
        stored = [one for one in adapter.stored if not placed.isdisjoint(one.parts)]
        stored += [one for one in adapter.stored if one.kind == "vector"]
        ledger.adapter = replace(adapter, updates=updates, stored=stored)
        return ledger

    def move(self, ledger: Ledger) -> Ledger:
        """Decides how a planned LoRA moves, and moves it.

        Returns:
            The ledger, filled; a new one where the names turn out to pair blocks wrongly.

        Raises:
            ProLoRAError: see `prolora.transfer`.
        """
        ledger = self._decide(ledger)
        move_updates(ledger, self.cache, self.memory, self.options.progress)
        return ledger

    def _decide(self, ledger: Ledger) -> Ledger:
        """Decides a ledger's method; see `decide_method`."""
        better = decide_method(ledger, self.cache, self.memory)
        if better is None:
            return ledger
        assert ledger.lora is not None
        again = self.plan(ledger.lora, match=better)
        decide_method(again, self.cache, self.memory, renumbered=True)
        return again

    @in_full_precision
    def preview(self, lora: LoraLike, *, weighed: bool = False) -> TransferReport:
        """Reports what a transfer would map, skip and refuse, from the LoRA's own numbers.

        `weighed` compares the weights of the bases, and says what to expect. Without it none is
        read: blocks that weights match, and what the threshold would skip, count as mapped.
        Energies of updates that are made with weights of the base (DoRA, OFT, GLoRA) are not known.

        Raises:
            ProLoRAError: see `prolora.transfer`.
        """
        with use_lora(lora) as opened, self.cache.flush_at_end():
            ledger = self.plan(opened, "outline", weighed=weighed)
            ledger = self._decide(ledger) if weighed else ledger
        return build_report(ledger, carry_vectors(ledger), dry_run=True)

    def judge_move(self, lora: Lora, progress: Progress | None) -> Sentence:
        """Judges by the weights what a transfer would do; models that differ are an answer, too.

        Raises:
            ProLoRAError: see `prolora.transfer`.
        """
        self.options = replace(self.options, progress=progress)
        try:
            return self.preview(lora, weighed=True).in_words()
        except (UnrelatedBases, WrongBase) as error:
            return Sentence("✖", str(error).removeprefix(f"{lora.where}: "))

    @in_full_precision
    def transfer(self, lora: LoraLike, *, hashed: bool = True) -> Transfer:
        """Plans, moves and finishes one LoRA; arguments as in `finish`.

        Raises:
            ProLoRAError: see `prolora.transfer`.
        """
        with use_lora(lora) as opened, self.cache.flush_at_end():
            return self.finish(self.move(self.plan(opened)), hashed=hashed)

    def run(
        self,
        lora: LoraLike,
        out: str | PathLike[str] | None,
        progress: Progress | None,
        *,
        renews: bool = False,
    ) -> Transfer:
        """Moves a LoRA into memory or to a path; keeps a current result there."""
        pair = replace(self, options=replace(self.options, progress=progress))
        if out is None:
            return pair.transfer(lora)
        return write_or_keep(
            (lora, self.source, self.target, pair.options),
            out,
            pair.preview,
            pair.transfer,
            renews=renews,
            make_room=self.cache.make_room,
        )

    def finish(self, ledger: Ledger, *, hashed: bool = True) -> Transfer:
        """Assembles the target's adapter, and the report.

        `hashed` lets the header name the bases; what is never written needs none.

        Raises:
            ProLoRAError: what stopped the move.
        """
        options = ledger.options
        updates = ledger.moved | {n: ledger.adapter.updates[n] for n in ledger.plan.passed}
        vectors = carry_vectors(ledger, updates)
        moved = assemble_adapter(ledger, updates, vectors[0])
        if ledger.block_factors:
            moved = scale_adapter(moved, ledger.block_factors)
        if hashed:
            with ledger.clock("hash"):
                moved = replace(moved, metadata=build_metadata(ledger))
        written = options.format or "auto", read_dtype(options.dtype)
        stored = adapters.find_kept(moved, *written)
        report = build_report(
            ledger,
            vectors,
            asked=ledger.asked or options.method_name,
            kept_energy={} if stored else dict(ledger.adapter.kept_energy),
            as_stored=stored is not None,
            base_dependent=stored.depend_on_base if stored else 0,
            seconds=ledger.clock.seconds,
            provenance=read_provenance(moved.metadata) if hashed else {},
        )
        inputs = list_inputs(ledger.lora, self.source, self.target)
        return Transfer(moved, report, inputs, *written)
