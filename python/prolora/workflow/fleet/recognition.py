"""The base that a LoRA belongs to, told by headers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...adapters.family import claimed_family
from ...adapters.lora import Lora
from ...bases import Base
from ...bases.cache.basis_cache import BasisCache
from ...bases.experts import Experts
from ...errors import ProLoRAError, UnsupportedFormat
from ..base_check import HASH_KEYS, explain_misfit, is_named_base, is_stated_base
from ..moved_before import check_moved_before, read_header
from ..options import TransferOptions


@dataclass
class SourceFinder:
    """Several bases, and a search for the one of a LoRA."""

    sources: Mapping[str, Experts]  # path -> base
    options: TransferOptions  # of the transfer
    cache: BasisCache  # remembers the hashes of files
    _misfits: dict[tuple[str, str], str] = field(default_factory=dict)

    def find(self, lora: Path) -> str:
        """Returns the path of the base that a LoRA belongs to.

        Raises:
            UnsupportedFormat: it fits none, or several and nothing tells which.
            AlreadyMoved: prolora moved it to a base that is none of them.
            ProLoRAError: it cannot be read.
        """
        bases = {path: next(iter(experts.values())) for path, experts in self.sources.items()}
        if len(bases) == 1:
            return next(iter(bases))  # the move itself says whether it fits
        header = read_header(lora)
        fitting = self._list_moved_to(lora, self._list_fitting(lora, bases))
        tests = (
            lambda base: is_stated_base(header, base, self.cache),
            lambda base: is_named_base(header, base.name),
            lambda base: base.family is not None and base.family == claimed_family(header),
        )
        for test in tests:
            if len(fitting) > 1:
                fitting = {path: base for path, base in fitting.items() if test(base)} or fitting
        if len(fitting) > 1:
            raise UnsupportedFormat(
                f"{lora}: it fits {', '.join(fitting)}, and its header does not tell which of them "
                "it was trained on; move it with one `source`"
            )
        return next(iter(fitting))

    def _list_fitting(self, lora: Path, bases: Mapping[str, Base]) -> dict[str, Base]:
        """Returns the bases that have all modules of a LoRA in its shapes.

        Raises:
            UnsupportedFormat: no base fits.
        """
        signature = _sign_header(Lora.open(lora))
        reasons = {}
        for path, base in bases.items():
            if (signature, path) not in self._misfits:
                self._misfits[signature, path] = str(explain_misfit(lora, base) or "")
            reasons[path] = self._misfits[signature, path]
        if all(reasons.values()):
            text = "; ".join(f"{path}: {reason}" for path, reason in reasons.items())
            raise UnsupportedFormat(f"{lora}: it fits none of the sources. {text}")
        return {path: base for path, base in bases.items() if not reasons[path]}

    def _list_moved_to(self, lora: Path, bases: Mapping[str, Base]) -> dict[str, Base]:
        """Returns the bases to which prolora may have moved a LoRA.

        Raises:
            AlreadyMoved: it belongs to none of them.
        """
        fitting, refusal = {}, None
        for path, base in bases.items():
            try:
                check_moved_before(lora, base, self.options, self.cache)
                fitting[path] = base
            except ProLoRAError as error:
                refusal = error
        if refusal is not None and not fitting:
            raise refusal
        return fitting


def _sign_header(opened: Lora) -> str:
    """Signs a header: equal for equal keys, shapes, configuration and claimed family."""
    parts = [
        [[key, *header.shape] for key, header in opened.headers.items()],
        opened.config,
        claimed_family(opened.metadata),
        *map(opened.metadata.get, ("lora_adapter_metadata", *HASH_KEYS)),
    ]
    return json.dumps(parts, sort_keys=True, default=str)
