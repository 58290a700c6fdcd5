"""The residual streams that the target's blocks should give out, mapped over from the source."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..probe_run import FittedModules, ProbeRun
from ..recording.spill import SpilledRows, SpillStore
from ..recording.translation import Question
from ..updates import apply_updates
from .blocks import Streams, read_streams
from .ridge_map import RidgeMap, source_features

MAP_BYTES = 4 << 30
"""Bound on the covariances and maps that are in memory at a time."""

PREDICTION = ""
"""Key of the wanted prediction, to which the last block is fitted."""

Maps = dict[tuple[str, int], RidgeMap]
"""One map for each block and each of its streams, where the source has matching streams."""


class WantedStreams:
    """r_t + (r_s with LoRA − r_s)·T for every block but the last, v_t + v_s with LoRA − v_s for it.

    They are computed for a group of blocks at a time, when the first of them is asked for: each
    group costs two passes over the questions, and its maps and streams must fit into memory.

    Attributes:
        blocks: the target's blocks that get updates, in the order in which they run.
        explained: block -> share of the variance of each of its streams that the maps explain.
    """

    def __init__(
        self, run: ProbeRun, questions: Sequence[Question], modules: FittedModules
    ) -> None:
        """Computes nothing yet."""
        self.run, self.questions, self.modules = run, questions, modules
        self.blocks = list(modules.by_block)
        self.explained: dict[str, tuple[float, ...]] = {}
        self.store = SpillStore(run.settings.share_memory(2))

    def rows_of(self, block: str) -> SpilledRows:
        """What the block should give out at every question; the prediction for the last block."""
        rows = self._locate(block)
        if (0, rows.name) not in self.store:
            group = next(group for group in self.groups if block in group)
            self._store_group(group[group.index(block) :])
        return rows

    def remove(self, block: str) -> None:
        """Frees what is stored for a block."""
        rows = self._locate(block)
        if (0, rows.name) in self.store:
            rows.remove()

    def _locate(self, block: str) -> SpilledRows:
        name = PREDICTION if block == self.blocks[-1] else block
        return SpilledRows(self.store, name, len(self.questions))

    @cached_property
    @torch.no_grad()
    def groups(self) -> list[list[str]]:
        """The blocks in as few groups as fit into memory."""
        question = self.questions[0]
        before = read_streams(self.run.source, self.modules.source_blocks, question.source)
        plain = read_streams(self.run.target, self.blocks[:-1], question.target)
        limit = self.run.settings.share_memory(2)
        groups: list[list[str]] = [[]]
        maps = streams = 0
        for block in self.blocks:
            map_bytes = stream_bytes = 0
            for i, stream in enumerate(plain.get(block, ())):
                x = self._features(before, block, i, stream)
                p, q = 0 if x is None else x.shape[-1], stream.shape[-1]
                map_bytes += 8 * p * (p + q)
                stream_bytes += stream.numel() * stream.element_size() * len(self.questions)
            full = maps + map_bytes > MAP_BYTES
            full = full or (limit is not None and streams + stream_bytes > limit)
            if full and groups[-1]:
                groups.append([])
                maps = streams = 0
            groups[-1].append(block)
            maps, streams = maps + map_bytes, streams + stream_bytes
        return groups

    def _features(
        self, streams: dict[str, Streams], block: str, i: int, stream: Tensor
    ) -> Tensor | None:
        """The source's streams that predict stream i of a block of the target."""
        depth = self.blocks.index(block) / max(1, len(self.blocks) - 1)
        return source_features(streams, i, stream.shape[1], depth)

    @torch.no_grad()
    def _store_group(self, group: Sequence[str]) -> None:
        """Stores by (question, block) what the blocks of a group should give out."""
        inner = [block for block in group if block != self.blocks[-1]]
        maps = self._fit_maps(inner)
        for block in inner:
            self.explained[block] = tuple(
                maps[block, i].explained for i in range(2) if (block, i) in maps
            )
        count = len(self.questions)
        for k, question in enumerate(self.questions):
            self.run.notify(count + k, 2 * count, "mapping")
            self._store_question(k, question, group, maps)

    def _fit_maps(self, inner: Sequence[str]) -> Maps:
        """The first pass over the questions: from the source's streams to those of the blocks."""
        maps = {(block, i): RidgeMap() for block in inner for i in range(2)}
        count = len(self.questions)
        for k, question in enumerate(self.questions):
            self.run.notify(k, 2 * count, "mapping")
            if not inner:
                break
            before = read_streams(self.run.source, self.modules.source_blocks, question.source)
            plain = read_streams(self.run.target, inner, question.target)
            for block in inner:
                for i, stream in enumerate(plain[block]):
                    x = self._features(before, block, i, stream)
                    if x is not None:
                        maps[block, i].add(x, stream)
        used = {key: ridge_map for key, ridge_map in maps.items() if ridge_map.count}
        for ridge_map in used.values():
            ridge_map.solve(self.run.settings.map_ridge)
        return used

    def _store_question(self, k: int, question: Question, group: Sequence[str], maps: Maps) -> None:
        """The second pass, at one question: applies the maps to the source's change."""
        run, source_blocks = self.run, self.modules.source_blocks
        inner = [block for block in group if block != self.blocks[-1]]
        before = read_streams(run.source, source_blocks, question.source)
        plain = read_streams(run.target, inner, question.target)
        change = -run.translation.of_source(run.source, question)
        with apply_updates(run.source, run.adapter.updates):
            after = read_streams(run.source, source_blocks, question.source)
            change += run.translation.of_source(run.source, question, adapted=True)
        if len(inner) < len(group):
            prediction = run.translation.of_target(run.target, question)
            self.store.put((k, PREDICTION), (prediction + change,))
        for block in inner:
            parts = []
            for i, stream in enumerate(plain[block]):
                x, y = (self._features(f, block, i, stream) for f in (before, after))
                if x is None or y is None:
                    parts.append(stream)  # no block of the source has this resolution
                else:
                    parts.append(stream + maps[block, i](y - x))
            self.store.put((k, block), tuple(parts))
