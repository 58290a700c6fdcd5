"""Reports made by hand, for tests of what is shown of them."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from typing import Any

from prolora.core.verdict import PairVerdict
from prolora.moving.transfer_report import TransferReport
from prolora.reports.module_report import Measures, ModuleReport

KINDS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
PLACES = ("down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.1")
VOID = {"meta", "img", "input", "br", "wbr"}


def make_measures(phi: float = 0.9) -> Measures:
    numbers = (phi, phi, 0.1, 0.1, 0.8, 0.8, 320, 320, 0.7, 0.1, 0.1, 0.1, 1e-4)
    angles = tuple(i / 10 for i in range(5))
    return Measures(*numbers, True, "krylov", angles, angles)


def make_row(source: str, status: str = "mapped", **fields: Any) -> ModuleReport:
    moved = status == "mapped"
    known = {
        "target": source if moved else None,
        "reason": "projected" if moved else "the target has no such module",
        "shape": (1280, 1280),
        "rank_in": 32,
        "rank_out": 64 if moved else 0,
        "energy": 0.25,
        "drift": 0.15 if moved else None,
        "cosine": 0.98 if moved else None,
        "norm_ratio": math.sqrt(0.75),
        "copy_distance": 0.4,
        "measures": make_measures() if moved else None,
    }
    return ModuleReport(source=source, status=status, **(known | fields))


def make_report(rows: list[ModuleReport] | None = None, **fields: Any) -> TransferReport:
    """Three places of two blocks and four kinds; the second block of each was skipped."""
    if rows is None:
        rows = [
            make_row(f"{place}.transformer_blocks.{i}.{kind}", "skipped" if i else "mapped")
            for place in PLACES
            for i in range(2)
            for kind in KINDS
        ]
    known = {
        "method": "prolora",
        "rank_rule": 0.99,
        "threshold": 0.8,
        "match": "same name",
        "source": "sdxl",
        "target": "ssd-1b",
        "asked": "prolora",
        "verdict": PairVerdict(0.15, 0.98),
        "seconds": {"read": 0.5},
        "provenance": {"version": "1.0", "source_hash": "sha256:aa", "lora_hash": "sha256:cc"},
    }
    return TransferReport(modules=tuple(rows), **(known | fields))


class Page(HTMLParser):
    """What a page holds; fails where elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes)
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self.texts.append(data)
        if self._open:
            self.inside.setdefault(self._open[-1], []).append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def values(self, attribute: str) -> list[str]:
        return [given[attribute] or "" for _, given in self.tags if attribute in given]

    @property
    def text(self) -> str:
        return "".join(self.texts)
