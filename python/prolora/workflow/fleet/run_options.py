"""The choices of a migration: who does the work, and with what; none of them changes a result."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

from ...bases.base import Progress
from ...core.option_fields import option
from ...errors import InvalidOption
from ..options import check_choice
from .engines.engine import Engine

EngineName = Literal["local", "ray"]
TIME_LIMIT = 3600.0
"""Seconds; much more than a weight, a file or a base takes on a slow drive."""
# Seconds; the system's clocks take no more.
_LONGEST = 1e9
_PANEL = "Engine"


@dataclass(frozen=True, kw_only=True)
class MigrationOptions:
    """How a plan is done; `migrate` takes each of these by its name."""

    engine: EngineName | Engine = option(
        "local",
        'What does the work: "local", this process alone, or "ray", a cluster.',
        panel=_PANEL,
        words=get_args(EngineName),
    )
    shard: tuple[int, int] | str | None = option(
        None,
        "Only this part of the plan, as 2/8, for jobs of an array.",
        panel=_PANEL,
        metavar="I/N",
    )
    address: str | None = option(
        None,
        "Address of the Ray cluster. Default: the connection that this process has, or a Ray that "
        "is started on this machine for the length of the run.",
        panel=_PANEL,
        metavar="HOST:PORT",
    )
    workers: int | None = option(
        None,
        "How many workers the engine ray starts. Default: one a core, or as many as the GPUs have "
        "room for.",
        panel=_PANEL,
        metavar="N",
    )
    gpus_per_worker: float | None = option(
        None, "Share of a GPU that each of them takes.", panel=_PANEL, metavar="SHARE"
    )
    retries: int = option(
        2,
        "How often a LoRA is tried again that the system failed (a file that cannot be reached, no "
        "memory, a lost worker).",
        panel=_PANEL,
        metavar="N",
    )
    retry_failed: bool = option(
        False, "Also try again what an earlier run of this plan refused.", panel=_PANEL
    )
    time_limit: float = option(
        TIME_LIMIT,
        "Seconds without any progress (a file or a weight that is done) after which a LoRA is "
        "given up and its worker replaced, and after which the claims of another process that does "
        "not get on are taken over.",
        panel=_PANEL,
        metavar="SECONDS",
    )
    cache: str | os.PathLike[str] | None = option(
        None, "Folder that keeps subspaces. Default: as long as their bases are open."
    )
    device: str | None = option(None, "Where to compute, as torch names it.")
    max_memory: int | str | None = option(
        None, "Memory that a worker's process may take: bytes, or a text such as 2GiB."
    )
    progress: Progress | None = option(
        None, "Called as progress(done, total, name); what it raises ends the call."
    )

    def __post_init__(self) -> None:
        """Refuses what no run can use, before anything is made.

        Raises:
            InvalidOption: names the option and what it takes.
        """
        if self.retries < 0:
            raise InvalidOption(f"retries must be 0 or more, not {self.retries!r}")
        if not 0 < self.time_limit <= _LONGEST:
            raise InvalidOption(f"time_limit is a number of seconds, not {self.time_limit!r}")
        if self.workers is not None and self.workers < 1:
            raise InvalidOption(f"workers must be 1 or more, not {self.workers!r}")
        if self.gpus_per_worker is not None and not 0 <= self.gpus_per_worker < math.inf:
            raise InvalidOption(
                f"gpus_per_worker is a share of a GPU, not {self.gpus_per_worker!r}"
            )
        if isinstance(self.engine, str):
            check_choice("engine", self.engine, get_args(EngineName))
        for name in ("address", "workers", "gpus_per_worker"):
            if self.engine != "ray" and getattr(self, name) is not None:
                raise InvalidOption(
                    f"{name} is for a cluster, which the engine ray works on, and the engine is "
                    f"{self.engine!r}: choose engine ray, or start one process a shard"
                )


class MigrationChanges(TypedDict, total=False):
    """The fields of `MigrationOptions` as keywords, for type checkers; a test compares the two."""

    engine: EngineName | Engine
    shard: tuple[int, int] | str | None
    address: str | None
    workers: int | None
    gpus_per_worker: float | None
    retries: int
    retry_failed: bool
    time_limit: float
    cache: str | os.PathLike[str] | None
    device: str | None
    max_memory: int | str | None
    progress: Progress | None


DEFAULT_MIGRATION = MigrationOptions()
