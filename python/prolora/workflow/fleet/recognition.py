"""Which base a LoRA belongs to, and whether it can go to another: told by headers alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...adapters.family import claimed_family
from ...adapters.lora import Lora
from ...bases import Base
from ...bases.cache.basis_cache import BasisCache
from ...bases.experts import ExpertPair, Experts
from ...bases.weights import Origin
from ...errors import ProLoRAError, UnsupportedFormat
from ...files.hashing import hash_text
from ..base_check import HASH_KEYS, explain_misfit, is_named_base, is_stated_base
from ..by_weights.base_pair import BasePair
from ..by_weights.ledger import BYTES_A_NUMBER
from ..moved_before import check_moved_before, read_header
from ..options import TransferOptions
from .listing import ListedLora


@dataclass(frozen=True, slots=True)
class Outline:
    """What a plan needs to know of a LoRA.

    Attributes:
        signature: equal for LoRAs whose headers mean the same.
        modules: number of its tensors, by three: an update has up, down and mostly alpha.
        numbers: number of its values.
    """

    signature: str
    modules: int
    numbers: int

    @property
    def memory(self) -> int:
        """Estimated bytes in memory while it moves."""
        return BYTES_A_NUMBER * self.numbers


def outline_lora(opened: Lora, source: Base) -> Outline:
    """The outline of a LoRA, from its header."""
    numbers = sum(math.prod(header.shape) for header in opened.headers.values())
    signature = f"{sign_header(opened)} {source.path}"
    return Outline(signature, -(-len(opened.headers) // 3), numbers)


def sign_header(opened: Lora) -> str:
    """Equal for LoRAs with equal keys, shapes and configuration, of one claimed family."""
    parts = [
        [[key, *header.shape] for key, header in opened.headers.items()],
        opened.config,
        claimed_family(opened.metadata),
        *map(opened.metadata.get, ("lora_adapter_metadata", *HASH_KEYS)),
    ]
    return hash_text(json.dumps(parts, sort_keys=True, default=str))


class SourceFinder:
    """Tells to which of several bases a LoRA belongs."""

    def __init__(
        self,
        sources: Mapping[str, Experts],
        paths: Mapping[str, str],
        options: TransferOptions,
        cache: BasisCache,
    ) -> None:
        """Reads nothing yet.

        Args:
            sources: label -> base, opened.
            paths: label -> path, as lists may give it.
            options: of the transfer.
            cache: remembers the hashes of files.
        """
        self.sources = {label: next(iter(experts.values())) for label, experts in sources.items()}
        self.paths, self.options, self.cache = paths, options, cache
        self._fits: dict[tuple[str, str], str] = {}

    def find(self, lora: ListedLora, opened: Lora) -> str:
        """The label of the base that a LoRA belongs to.

        Args:
            lora: as it was listed.
            opened: the same, its header read.

        Raises:
            UnsupportedFormat: it fits none, or several and nothing tells which.
            AlreadyMoved: prolora moved it to a base that is none of them.
            ProLoRAError: it cannot be read.
        """
        labels = [self._find_listed(lora)] if lora.source else list(self.sources)
        fitting = self._list_fitting(lora, opened, labels)
        fitting = self._list_moved_to(lora, fitting)
        header = read_header(lora.path)
        for narrow in (self._have_hash, self._have_name, self._have_family):
            if len(fitting) > 1:
                fitting = narrow(header, fitting) or fitting
        if len(fitting) > 1:
            raise UnsupportedFormat(
                f"it fits {', '.join(fitting)}, and its header does not tell which of them it was "
                "trained on; name the base in a list (the LoRA, a tab, the base), or plan with "
                "one `source`"
            )
        return fitting[0]

    def _find_listed(self, lora: ListedLora) -> str:
        """The label of the base that a list names."""
        for label, path in self.paths.items():
            if lora.source in (label, path) or Path(path) == Path(lora.source).absolute():
                return label
        raise UnsupportedFormat(
            f"the list names {lora.source}, which is not a `source` of this plan"
        )

    def _list_fitting(self, lora: ListedLora, opened: Lora, labels: list[str]) -> list[str]:
        """The bases that have all modules of a LoRA in its shapes.

        Raises:
            UnsupportedFormat: there is none.
        """
        signature = sign_header(opened)
        reasons = {}
        for label in labels:
            key = signature, label
            if key not in self._fits:
                reason = explain_misfit(lora.path, self.sources[label])
                self._fits[key] = str(reason or "").replace(f"{opened.where}: ", "")
            reasons[label] = self._fits[key]
        fitting = [label for label in labels if not reasons[label]]
        if fitting:
            return fitting
        first = reasons[labels[0]]
        several = len(labels) > 1 and len(set(reasons.values())) > 1
        text = "; ".join(f"{label}: {reason}" for label, reason in reasons.items())
        raise UnsupportedFormat(f"it fits none of the sources. {text}" if several else first)

    def _list_moved_to(self, lora: ListedLora, labels: list[str]) -> list[str]:
        """The bases that a LoRA which was moved before may belong to.

        Raises:
            AlreadyMoved: it belongs to none of them.
        """
        fitting, refusal = [], None
        for label in labels:
            try:
                check_moved_before(lora.path, self.sources[label], self.options, self.cache)
                fitting.append(label)
            except ProLoRAError as error:
                refusal = error
        if refusal is not None and not fitting:
            raise refusal
        return fitting

    def _have_hash(self, header: Mapping[str, str], labels: list[str]) -> list[str]:
        """The bases that are the file whose hash the header gives."""
        bases = self.sources
        return [name for name in labels if is_stated_base(header, bases[name], self.cache)]

    def _have_name(self, header: Mapping[str, str], labels: list[str]) -> list[str]:
        """The bases with the name that the header gives."""
        bases = self.sources
        return [label for label in labels if is_named_base(header, bases[label].name, label)]

    def _have_family(self, header: Mapping[str, str], labels: list[str]) -> list[str]:
        """The bases of the family that the header claims."""
        wanted = claimed_family(header)
        return [label for label in labels if wanted and self.sources[label].family == wanted]


def refuse_move(
    lora: Path, bases: ExpertPair, options: TransferOptions, cache: BasisCache | None = None
) -> str:
    """Why a LoRA cannot move between two bases, "" as far as headers tell.

    Args:
        lora: the LoRA.
        bases: the two bases.
        options: of the transfer.
        cache: remembers the hashes of files.
    """
    hidden = _hide_weights(bases.source), _hide_weights(bases.target)
    try:
        BasePair(*hidden, options, cache or BasisCache(None)).plan(lora, "header")
    except _WeightsNeeded:
        return ""
    except ProLoRAError as error:
        return str(error)
    return ""


class _WeightsNeeded(Exception):
    """Only weights tell what becomes of a LoRA."""


@dataclass(frozen=True)
class _HiddenWeight:
    """A weight of which the header alone is known."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: Origin | None = None

    def read(self) -> Tensor:
        """Refused."""
        raise _WeightsNeeded

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Refused."""
        raise _WeightsNeeded


def _hide_weights(base: Base) -> Base:
    hidden = {n: _HiddenWeight(w.name, w.shape, w.dtype) for n, w in base.weights.items()}
    return replace(base, weights=hidden)
