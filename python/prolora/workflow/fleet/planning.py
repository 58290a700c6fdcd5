"""Making a plan: whose each LoRA is, where it can go, what that costs; only headers are read."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...adapters.unread import open_adapter
from ...bases.cache.basis_cache import BasisCache
from ...bases.experts import ExpertPair, Experts, choose_pairs, open_experts, pair_experts
from ...bases.identity import compute_fingerprint
from ...comparison.module_map import read_map
from ...core.precision import in_full_precision
from ...errors import InvalidOption, ProLoRAError
from ..options import (
    BEST,
    DEFAULT_OPTIONS,
    OptionChanges,
    TransferOptions,
    settle_options,
    takes_options,
)
from .calibration import Rates, calibrate
from .listing import ListedLora, list_loras
from .outcomes import find_state
from .plan import MOVES_BY_WEIGHTS, Entry, PairOfBases, Plan, PlannedBase, make_label
from .recognition import Outline, SourceFinder, outline_lora, refuse_move

if TYPE_CHECKING:
    from typing_extensions import Unpack

StrPath = str | os.PathLike[str]


@takes_options
@in_full_precision
def plan_migration(
    loras: StrPath | Iterable[str | os.PathLike[str]],
    sources: StrPath | Sequence[StrPath],
    targets: StrPath | Sequence[StrPath],
    options: TransferOptions = DEFAULT_OPTIONS,
    *,
    rates: Rates | None = None,
    **changes: Unpack[OptionChanges],
) -> Plan:
    """Plans the move of a collection to one or more bases; only headers are read.

    Args:
        loras: .safetensors files, folders, text files that list them, or addresses on the hub (see
            `fleet.listing`).
        sources: the bases that they were trained on; which of them a LoRA belongs to is told by its
            header, its keys and their shapes. A base is a file, a folder or an id on the hub.
        targets: the bases to move to.
        options: how the LoRAs will be moved, but for device, max_memory and probe, which are given
            to `migrate`; `cache` remembers the hashes of files, and `progress` is called as
            progress(done, total, LoRA).
        rates: speeds for the estimates, of another machine; None measures this one in a second.
        **changes: options by name, in place of those.

    Returns:
        A plan with an entry for each LoRA and target. Those that cannot move are in it, with the
        reason.

    Raises:
        InvalidOption: an option has a value that it does not take.
        UnsupportedFormat: a file or folder that is not there; a base that cannot be opened.
    """
    started = time.perf_counter()
    asked = settle_options(options, changes, here=False)
    chosen, progress = describe_choices(asked), asked.progress
    listed = list_loras(loras)
    rates = rates or calibrate()
    with BasisCache(asked.cache).saving() as hashes:
        shelf = _Shelf(hashes)
        source_labels = [shelf.open(path) for path in _list_paths(sources)]
        target_labels = [shelf.open(path) for path in _list_paths(targets)]
        planner = _Planner(shelf, source_labels, target_labels, chosen, rates)
        entries: list[Entry] = []
        for done, lora in enumerate(listed, 1):
            entries += planner.plan_lora(lora)
            if progress:
                progress(done, len(listed), lora.path.name)
    order = {label: number for number, label in enumerate(shelf.planned)}
    # Entries of a pair follow each other, and keep the order of the collection.
    entries.sort(key=lambda e: _order_pair(e.pair, order))
    notes = {"seconds": round(time.perf_counter() - started, 3), "loras": len(listed)}
    return Plan(entries, shelf.planned, chosen, notes)


def _order_pair(pair: PairOfBases, order: Mapping[str, int]) -> tuple[int, int, str]:
    last = len(order)
    return order.get(pair.source, last), order.get(pair.target, last), pair.expert


def _list_paths(paths: StrPath | Sequence[StrPath]) -> list[str]:
    """Paths as text, absolute where they are paths and not ids on the hub.

    Raises:
        InvalidOption: there are none.
    """
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not listed:
        raise InvalidOption("a plan needs a source base and a target base, at least one of each")
    return [os.path.abspath(p) if os.path.exists(p) else os.fspath(p) for p in listed]


def describe_choices(options: TransferOptions) -> dict[str, Any]:
    """The options as a plan keeps them: those that are not as usual, as JSON can hold them.

    A map of modules is kept by its content.

    Raises:
        InvalidOption: an option that a plan does not take.
        UnsupportedFormat: the map of modules cannot be read.
    """
    usual, given = vars(DEFAULT_OPTIONS), vars(options)
    for name in ("device", "max_memory", "overwrite"):
        if given[name] != usual[name]:
            raise InvalidOption(f"{name} is not an option of a plan")
    if options.method == BEST:
        raise InvalidOption(MOVES_BY_WEIGHTS)
    chosen = {
        name: value
        for name, value in given.items()
        if value != usual[name] and name not in ("cache", "progress")
    }
    if "dtype" in chosen:
        chosen["dtype"] = str(chosen["dtype"]).removeprefix("torch.")
    match = chosen.get("match", "auto")
    if isinstance(match, Mapping):
        chosen["match"] = dict(match)
    elif match not in ("auto", "name", "similarity"):
        chosen["match"] = read_map(Path(match))
    return chosen


@dataclass
class _Shelf:
    """The opened bases of a plan.

    Attributes:
        cache: remembers the hashes of files.
        planned: label -> base, as the plan has it.
        opened: label -> base, opened.
    """

    cache: BasisCache
    planned: dict[str, PlannedBase] = field(default_factory=dict)
    opened: dict[str, Experts] = field(default_factory=dict)

    def open(self, path: str) -> str:
        """Opens a base and gives its label; one that is open already has its label.

        Raises:
            ProLoRAError: it cannot be opened.
        """
        for label, planned in self.planned.items():
            if planned.path == path:
                return label
        experts = open_experts(path)
        first = next(iter(experts.values()))
        prints = {name: compute_fingerprint(base, self.cache) for name, base in experts.items()}
        files = {file for base in experts.values() for file in base.files}
        family = first.layout or first.family or ""
        size = sum(file.stat().st_size for file in files)
        label = make_label(_name_base(path), self.planned)
        self.planned[label] = PlannedBase(path, prints, family, size)
        self.opened[label] = experts
        return label


def _name_base(path: str) -> str:
    """The name of a file without its suffix, or of a folder; the pipeline's, for a part of it."""
    place = Path(path)
    if place.name in ("unet", "transformer") and place.parent.name:
        place = place.parent
    return place.stem if place.suffix in (".safetensors", ".gguf") else place.name


class _Planner:
    """Plans one LoRA after the other; what was learnt of one serves those with the same header."""

    def __init__(
        self,
        shelf: _Shelf,
        sources: Sequence[str],
        targets: Sequence[str],
        chosen: dict[str, Any],
        rates: Rates,
    ) -> None:
        self.shelf, self.targets, self.rates = shelf, list(dict.fromkeys(targets)), rates
        self.options = Plan((), {}, chosen).make_options()
        opened = {label: shelf.opened[label] for label in sources}
        paths = {label: shelf.planned[label].path for label in sources}
        self.finder = SourceFinder(opened, paths, self.options, shelf.cache)
        self._refusals: dict[tuple[str, PairOfBases], str] = {}

    def plan_lora(self, lora: ListedLora) -> list[Entry]:
        """The entries of a LoRA: one for each target, or two where both experts get it."""
        size, modified = find_state(lora.path)
        draft = Entry(str(lora.path), PairOfBases("", ""), size=size, modified=modified)
        try:
            if lora.error:
                raise lora.error
            opened = open_adapter(lora.path)
            label = self.finder.find(lora, opened)
            outline = outline_lora(opened, next(iter(self.shelf.opened[label].values())))
        except ProLoRAError as error:
            return [
                replace(draft, pair=PairOfBases("", target), refused=str(error))
                for target in self.targets
            ]
        entries = []
        for target in self.targets:
            entries += self._plan_pair(draft, outline, label, target)
        return entries

    def _plan_pair(self, draft: Entry, outline: Outline, source: str, target: str) -> list[Entry]:
        """The entries of a LoRA on its way from one base to another."""
        pair = PairOfBases(source, target)
        if self.shelf.planned[source] == self.shelf.planned[target]:
            return [replace(draft, pair=pair, refused="it is a LoRA of the target already")]
        try:
            pairs = pair_experts(self.shelf.opened[source], self.shelf.opened[target])
            chosen = choose_pairs(Path(draft.lora), pairs)
        except ProLoRAError as error:
            return [replace(draft, pair=pair, refused=str(error))]
        entries = []
        for bases, appended in chosen:
            pair = PairOfBases(source, target, bases.expert)
            refused = self._judge(outline, pair, bases, draft.lora)
            seconds = 0.0 if refused else self._estimate_seconds(outline, draft.size)
            memory = 0 if refused else outline.memory
            entries.append(
                replace(
                    draft,
                    pair=pair,
                    appended=appended,
                    seconds=round(seconds, 6),
                    memory=memory,
                    refused=refused,
                )
            )
        return entries

    def _judge(self, outline: Outline, pair: PairOfBases, bases: ExpertPair, lora: str) -> str:
        """Why a LoRA with such a header cannot move, "" if it can."""
        key = outline.signature, pair
        if key not in self._refusals:
            reason = refuse_move(Path(lora), bases, self.options, self.shelf.cache)
            self._refusals[key] = reason.replace(f"{lora}: ", "")
        return self._refusals[key]

    def _estimate_seconds(self, outline: Outline, size: int) -> float:
        rates, method = self.rates, self.options.chosen
        seconds = size * rates.per_byte + outline.modules * rates.per_module
        if method.needs_bases:
            columns = self.options.rank if isinstance(self.options.rank, int) else 256
            seconds += 6 * columns * outline.numbers * rates.per_operation
        return seconds
