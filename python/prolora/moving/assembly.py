"""What a transfer gives: the adapter of the target, its header, and the report."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.formats.metadata import rewrite_metadata
from ..adapters.formats.moves import read_moves, write_moves
from ..architectures.modules import is_in_text_encoder
from ..bases import Base
from ..bases.base import list_quantised
from ..bases.identity import compute_short_hash, name_base
from ..bases.pipeline_files import draws_in_few_steps, is_named_few_step
from ..core.lowrank import LowRank
from ..files.store import replace_surrogates
from ..reports.module_report import LEFT_OUT
from ..verbs.block_weights import BlockWeights
from ..version import __version__
from .ledger import Ledger, list_missed, list_tensors_left_out
from .plan import ModulePlan
from .transfer_report import A_VECTOR, TransferReport


def carry_vectors(
    ledger: Ledger, moved: Collection[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Moves the vectors of an adapter to the target.

    A text encoder's stay as they are; all others are multiplied by the strength. `moved` are target
    modules that got an update; a bias stays behind with its module. None: as if every module of the
    plan got one.

    Returns:
        "module.bias" or "module.weight" of the target -> what is added; vector of the adapter ->
        why it has no counterpart.
    """
    carried, left_out = {}, {}
    for name, vector in ledger.adapter.vectors.items():
        module, _, tensor = name.rpartition(".")
        places, reason = _find_places(ledger, module, len(vector), moved)
        strength = 1.0 if is_in_text_encoder(module) else ledger.options.strength
        if places and all(ledger.block_factors.get(place) == 0 for place in places):
            places, reason = [], LEFT_OUT
        if not places:
            left_out[name] = f"{A_VECTOR}: {reason}"
        for place in places:
            carried[f"{place}.{tensor}"] = vector if strength == 1 else vector * strength
    return carried, left_out


def _find_places(
    ledger: Ledger, module: str, width: int, moved: Collection[str] | None
) -> tuple[list[str], str]:
    """Returns the target modules for a vector, or why there are none."""
    if is_in_text_encoder(module):  # its vectors follow its updates
        if ledger.options.text_encoder == "skip":
            return [], "text encoder, left out as asked"
        encoder = module.partition(".")[0] + "."
        skipped = (why for name, why in ledger.plan.skipped.items() if name.startswith(encoder))
        reason = next(skipped, "")
        return [] if reason else [module], reason
    places = list(_find_partners(module, width, ledger.plan, ledger.source, ledger.target))
    if not places:
        return [], "the target has no such module of that width"
    if moved is not None and any(row.source == module for row in ledger.rows.values()):
        places = [place for place in places if place in moved]
    return places, "the update of its module was left out"


def _find_partners(
    module: str, width: int, plan: ModulePlan, source: Base, target: Base
) -> Iterator[str]:
    """Yields the target's modules for `module`: a norm goes where its block's matrices go."""
    if module in source.shapes:
        for partner, origin in plan.table.items():
            same = origin == module and source.shapes[origin] == target.shapes[partner]
            if same and target.shapes[partner][0] == width:
                yield partner
        return
    block, dot, leaf = module.rpartition(".")
    seen = set()
    for partner, origin in plan.table.items():
        rest = origin.removeprefix(block + dot)
        beside = origin.startswith(block + dot) and partner.endswith(rest)
        shape = target.shapes[partner]
        if beside and source.shapes[origin] == shape and width in shape[:2]:
            place = f"{partner.removesuffix(rest)}{leaf}"
            if place not in seen:
                seen.add(place)
                yield place


def assemble_adapter(
    ledger: Ledger, updates: dict[str, LowRank], vectors: dict[str, Tensor]
) -> Adapter:
    """Assembles the target's adapter, with the LoRA's own header."""
    return replace(
        ledger.adapter,
        updates=updates,
        kernels=list_kernels(updates, ledger.target),
        vectors=vectors,
        origin=ledger.adapter.model.of_base(ledger.target.model),
        unread={},
    )


def list_kernels(modules: Iterable[str], target: Base) -> dict[str, tuple[int, ...]]:
    """Returns module -> (kh, kw), or (k,), of the target's convolutions."""
    shapes = {name: target.shapes.get(name, ()) for name in modules}
    return {name: shape[2:] for name, shape in shapes.items() if len(shape) > 2}


def build_metadata(ledger: Ledger) -> dict[str, str]:
    """Returns the LoRA's own header with the target's names, and how the result was made."""
    source, target, options = ledger.source, ledger.target, ledger.options
    provenance = {
        "version": __version__,
        "method": options.method_name,
        "strength": f"{options.strength:.4g}",
        "rank_rule": str(options.rank),
        "threshold": str(options.threshold),
        "match": ledger.plan.rule,
        **({"blocks": str(BlockWeights.read(options.blocks))} if options.blocks else {}),
        "source": source.name,
        "target": target.name,
        **write_moves(read_moves(ledger.adapter.metadata)),
    }
    hashes = {"source_hash": name_base(source), "target_hash": name_base(target)}
    metadata = rewrite_metadata(
        ledger.adapter.metadata,
        target_name=target.name,
        target_layout=target.layout,
        target_short_hash=compute_short_hash(target),
        provenance=provenance | {key: value for key, value in hashes.items() if value},
    )
    # A header must be text; names of files need not be.
    return {replace_surrogates(key): replace_surrogates(x) for key, x in metadata.items()}


def build_report(
    ledger: Ledger, vectors: tuple[Collection[str], dict[str, str]], **facts: Any
) -> TransferReport:
    """Builds the report of a transfer by weights.

    `vectors` is what `carry_vectors` returns; `known` are further fields.
    """
    adapter, plan, options, target = ledger.adapter, ledger.plan, ledger.options, ledger.target
    few_steps = draws_in_few_steps(target, options.target_steps)
    if few_steps and draws_in_few_steps(ledger.source):
        few_steps = False
    ledger.settle()
    return TransferReport(
        method=options.method_name,
        rank_rule=options.rank,
        threshold=options.threshold,
        match=plan.rule,
        source=ledger.source.name,
        target=target.name,
        modules=tuple(ledger.rows.values()),
        decisions=plan.decisions,
        dropped_blocks=plan.dropped,
        renumbered=dict(plan.renumbered),
        vectors=len(vectors[0]),
        left_out=list_tensors_left_out(adapter) | vectors[1],
        unread=list_missed(adapter, options.text_encoder),
        strength=options.strength,
        blocks="" if options.blocks is None else str(BlockWeights.read(options.blocks)),
        quantised=list_quantised(ledger.source, target),
        moves=read_moves(adapter.metadata),
        few_steps=few_steps,
        few_by_name=few_steps is None and is_named_few_step(target),
        verdict=ledger.verdict,
        warnings=ledger.warnings,
        **facts,
    )
