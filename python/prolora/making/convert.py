"""A LoRA in another format, precision, rank or kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import adapters
from ..adapters.adapter import Adapter
from ..adapters.algorithms import forms
from ..adapters.algorithms.forms import MAX_SIDE
from ..adapters.algorithms.truncation import MAX_RANK
from ..adapters.alphas import LARGEST_ALPHA, SMALLEST_ALPHA
from ..adapters.contents import parse_contents
from ..adapters.keys.tensor_keys import StoredTensor
from ..adapters.lora import Lora
from ..bases import Base, BaseLike, open_base
from ..core.precision import in_full_precision
from ..core.recompression import product_energies
from ..errors import InvalidOption, UnsupportedFormat
from ..moving.base_check import read_lora
from ..moving.lazy_bases import narrow_base
from ..moving.ledger import list_tensors_left_out
from ..moving.peft_modules import add_peft_config
from ..reports.lora_report import ENOUGH
from ..reports.module_report import LEFT_OUT, list_unread_modules
from ..verbs.block_weights import Blocks, BlockWeights, find_factors, scale_adapter
from ..verbs.option_fields import option, take_option
from ..verbs.option_keywords import resolve_options, takes_options
from ..verbs.options import (
    OUTPUT,
    LoraLike,
    Output,
    TransferOptions,
    cut_rank,
    name_lora,
    read_dtype,
    use_lora,
)
from ..verbs.output_paths import check_output
from ..verbs.result import Transfer, list_inputs, save_result
from ..verbs.rows import describe_conversion, describe_left_out
from .made_report import MadeReport


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Output):
    """How a LoRA is converted; `convert` takes each of these by its name."""

    blocks: Blocks | None = take_option(TransferOptions, "blocks", panel=OUTPUT)
    alpha: float | None = option(
        None,
        "Alpha of every update, in place of what the file has: each acts at alpha / rank.",
        panel=OUTPUT,
        metavar="ALPHA",
    )

    def __post_init__(self) -> None:
        """Reads the factors by block, too."""
        super().__post_init__()
        if self.blocks is not None:
            BlockWeights.read(self.blocks)
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if self.alpha is not None and not (
            number and SMALLEST_ALPHA <= self.alpha <= LARGEST_ALPHA
        ):
            bounds = f"{SMALLEST_ALPHA:g} to {LARGEST_ALPHA:g}"
            raise InvalidOption(f"`alpha` is a number from {bounds}, not {self.alpha!r}")


DEFAULT_CONVERSION = ConvertOptions()


@takes_options
def convert(
    lora: LoraLike,
    base: BaseLike | None = None,
    options: ConvertOptions = DEFAULT_CONVERSION,
    *,
    out: str | PathLike[str] | None = None,
    **changes: Any,
) -> Transfer:
    """Converts a LoRA: into another format, precision or rank; any kind becomes a plain LoRA.

    Args:
        lora: as `transfer` takes it.
        base: the base that it was trained on. Needed where an update depends on its weights (DoRA,
            GLoRA, OFT), and where names with underscores belong to no known family.
        options: how to convert it.
        out: a file to write, or a folder for format "peft"; checked before any work.
        **changes: single options by name; they win over `options`.

    Returns:
        The LoRA, and the report: what of each update is in it.

    Raises:
        UnsupportedFormat: a file that cannot be read exactly, one that needs its base and has none,
            or a result that `format` cannot hold.
        ShapeMismatch: an update that does not fit the base.
        WrongBase: the LoRA is for another model than `base`.
        NonFiniteWeights: NaN or Inf, named.
        OutputExists: something has the name of `out`.
        OutputError: `out` cannot be written, or is an input.
    """
    options = resolve_options(options, changes)
    lora = add_peft_config(lora, base)
    model = None if base is None else open_base(narrow_base(base, lora))
    with use_lora(lora) as opened:
        if out is None:
            return _run(opened, model, options)
        options = options.for_file()
        inputs = list_inputs(opened, *filter(None, [model]))
        check_output(out, inputs, options.overwrite, options.format)
        return save_result(_run(opened, model, options), Path(out), options.overwrite)


@in_full_precision
def _run(lora: Lora | Adapter, base: Base | None, options: ConvertOptions) -> Transfer:
    original, inputs = name_lora(lora), list_inputs(lora, *filter(None, [base]))
    before = None
    # What is wider in the file's own form is not computed wider than it is written.
    asked = options.out_rank if isinstance(options.out_rank, int) else MAX_RANK
    if options.alpha is not None:
        before, lora = read_plain(lora, base, asked), _set_alpha(lora, options.alpha)
    adapter = read_plain(lora, base, asked)
    dtype = read_dtype(options.dtype)
    left_out = list_tensors_left_out(adapter)
    plain = replace(adapter, algorithms={}, unread={}, left_out={}, refused=set())
    factors = find_factors(options.blocks, plain, base)
    if options.format is not None:
        adapters.check_format(plain, options.format)
    silent = [name for name in plain.vectors if factors.get(name.rpartition(".")[0]) == 0]
    left_out |= dict.fromkeys(silent, LEFT_OUT)
    gone = [name for name in plain.updates if factors.get(name) == 0]
    plain = scale_adapter(plain, factors)
    cut = {}
    for i, (name, update) in enumerate(plain.updates.items()):
        options.report_progress(i, len(plain.updates), name)
        cut[name] = cut_rank(update, options.out_rank, update.rank)
    result = plain.with_updates(cut)
    title = original.removesuffix(".safetensors")
    report = MadeReport(
        method="convert",
        original=title if before is None else f"{title} with alpha {options.alpha:g}",
        source=original,
        target=base.name if base else "",
        modules=(
            *list_unread_modules(adapter),
            *(describe_left_out(name, adapter.updates[name]) for name in gone),
            *(
                describe_conversion(
                    name,
                    adapter.algorithms.get(name, "lora"),
                    update,
                    cut[name].to(dtype or result.dtype),
                    adapter.kept_energy.get(name, 1.0),
                    len(adapter.shares.get(name, ())),
                )
                for name, update in plain.updates.items()
            ),
        ),
        blocks="" if options.blocks is None else str(BlockWeights.read(options.blocks)),
        vectors=len(plain.vectors),
        left_out=left_out,
        unread=tuple(adapter.unread),
        kept_energy={} if asked < MAX_RANK else dict(adapter.kept_energy),
    )
    if (report.share_held or ENOUGH) < ENOUGH:
        if rank := _find_rank(plain, {row.source: row.energy for row in report.modules}):
            report = replace(report, advice=f"Rank {rank} would keep {ENOUGH:.0%} (`out_rank`).")
    if before is not None:
        report = _describe_strength(report, before, adapter)
    return Transfer(result, report, inputs, options.format or "auto", dtype)


def _describe_strength(report: MadeReport, before: Adapter, after: Adapter) -> MadeReport:
    norms = {
        n: (float(x.norm()), float(after.updates[n].norm())) for n, x in before.updates.items()
    }
    times = {name: new / old for name, (old, new) in norms.items() if old}
    rows = tuple(
        replace(row.at_strength(t := times.get(row.source, 1.0)), energy=row.energy / t**2)
        for row in report.modules
    )
    ends = sorted({f"{ratio:.3g}" for ratio in times.values()}, key=float)
    sentence = f"It acts {' to '.join(ends[:1] + ends[1:][-1:])} times as strong as before."
    sentence = sentence if ends else "Before, its scales made nothing of it."
    return replace(report, modules=rows, advice=f"{sentence} {report.advice}".strip())


def _set_alpha(opened: Lora | Adapter, alpha: float) -> Lora:
    """Returns a LoRA with another alpha for every update that has a rank."""
    if isinstance(opened, Adapter):
        raise InvalidOption("`alpha` is for a file: updates in memory hold their scale")
    tensors, alphas = dict(opened.tensors), set()
    for slot in parse_contents(opened).slots:
        if slot.peft:
            raise InvalidOption(f"{opened.where}: set `lora_alpha` in its PEFT configuration")
        if slot.form.rank:
            path = tensors[next(iter(slot.keys.values()))].path
            alphas.add(slot.keys.get("alpha") or f"{path}.alpha")
            tensors.pop(slot.keys.get("scale", ""), None)
    tensors |= {key: StoredTensor.of(key, "F32", ()) for key in alphas}

    def read(key: str) -> Tensor:
        return torch.tensor(float(alpha)) if key in alphas else opened.read(key)

    return replace(opened, tensors=tensors, read=read, file=None, parsed={})


def _find_rank(plain: Adapter, energies: Mapping[str, float]) -> int:
    """Returns the rank at which all updates together hold enough; 0 if none is known to."""
    columns = torch.zeros(MAX_SIDE, dtype=torch.float64)
    for name, update in plain.updates.items():
        if (shares := plain.shares.get(name)) is None:
            columns[: update.rank] += product_energies(update.up, update.down)
        else:
            columns[: len(shares)] += shares * energies[name]
    enough = columns.cumsum(0) >= ENOUGH * sum(energies.values())
    return int(enough.int().argmax()) + 1 if enough.any() else 0


def read_plain(opened: Lora | Adapter, base: Base | None, rank: int = MAX_RANK) -> Adapter:
    """Reads the LoRA's updates, each as a plain LoRA; refuses one that needs a missing base."""
    if isinstance(opened, Adapter):
        return opened
    if base is not None:
        return read_lora(opened, base, rank=rank)
    for slot in parse_contents(opened).slots:
        if forms.needs_base(slot.keys.keys()):
            raise UnsupportedFormat(
                f"{opened.where}: the update of {slot.module.name} is "
                f"{forms.needs_base_reason(slot.keys.keys())}; give the base model that it was "
                "trained on, too"
            )
    return adapters.read_adapter(opened, rank=rank)
