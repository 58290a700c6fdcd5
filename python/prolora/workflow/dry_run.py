"""What a transfer would do, told without moving anything."""

from __future__ import annotations

import os
from dataclasses import replace

from ..bases import BaseLike, open_pair
from ..bases.cache.basis_cache import BasisCache
from ..core.precision import in_full_precision
from .by_weights.assembly import build_report
from .by_weights.base_pair import BasePair, use_lora
from .by_weights.transfer_report import TransferReport
from .by_weights.vectors import carry_vectors
from .options import LoraLike, TransferOptions


@in_full_precision
def plan_report(
    lora: LoraLike, source: BaseLike, target: BaseLike, options: TransferOptions
) -> TransferReport:
    """Reports what `transfer` would map, skip and refuse; weights are hardly read.

    Ranks are those that the file states, and energies follow from its tensors. The energy of what
    is made with the weights of the base (DoRA, OFT, GLoRA) is not known, so that parts are counted
    where the LoRA has such. The similarity threshold needs weights, so modules that it would skip
    still count as mapped here. Matching by similarity reads weights.

    Raises:
        ProLoRAError: what `transfer` refuses before it looks at weights.
    """
    old, new = open_pair(source, target)
    options = keep_known_cache(options)
    with use_lora(lora) as opened, BasisCache(options.cache).saving() as cache:
        ledger = BasePair(old, new, options, cache).plan(opened, "outline")
    ledger.weigh_rows()
    return build_report(ledger, ledger.rows.values(), carry_vectors(ledger), dry_run=True)


def keep_known_cache(options: TransferOptions) -> TransferOptions:
    """Drops a cache folder that a dry run would have to make."""
    known = options.cache is not None and os.path.isdir(os.fspath(options.cache))
    return options if known else replace(options, cache=None)
