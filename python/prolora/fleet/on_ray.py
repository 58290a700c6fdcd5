"""Batches given to the processes of a Ray cluster."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import OutputError, ProLoRAError
from ..files.sizes import parse_limit
from ..files.store import put_text
from ..version import __version__
from .batches import Batch, Job, Migrated, move_batch, note_refusal

RETRIES = 2
"""How often Ray gives a batch again whose process ended."""
TIME_LIMIT = 3600.0
"""Seconds without a LoRA that is done, after which a process is ended; more than any takes."""

log = logging.getLogger(__name__)


class LostWorker(ProLoRAError):
    """A LoRA whose process ends or hangs on each try."""

    code = "lost-worker"


@dataclass
class _Running:
    """A batch at work."""

    batch: Batch
    left: set[str]
    heard: float  # when it was given, or said something
    place: tuple[str, int] | None = None  # node and process, once it runs


def run_on_ray(address: str, batches: Sequence[Batch], job: Job) -> Iterator[Migrated]:
    """Moves batches in tasks of Ray.

    A batch that is lost more often than Ray tries again, or does not get on, is split: so the LoRA
    that ends or hangs its process is refused, and no other.
    """
    with _connect(address) as ray, _check_shared_folder(Path(job.folder)) as mark:
        needs: dict[str, Any] = {"num_cpus": 1, "max_retries": RETRIES}
        if str(job.options.device).startswith("cuda"):
            needs["num_gpus"] = 1
        if limit := parse_limit(job.options.max_memory):
            needs["memory"] = limit
        work = ray.remote(num_returns="streaming", **needs)(_work)
        running: dict[Any, _Running] = {}
        waiting, unstarted = deque(batches), 0
        while waiting or running:
            cores = int(ray.cluster_resources().get("CPU", 1))
            while waiting and len(running) < max(1, cores):
                batch = waiting.popleft()
                left = {lora for lora, _ in batch.loras}
                given = _Running(batch, left, time.monotonic())
                running[work.remote(batch, job, str(mark))] = given
            ready, _ = ray.wait(list(running), timeout=1.0, fetch_local=False)
            for answers in ready:
                yield from _collect(ray, answers, running, waiting, job)
            for answers, task in list(running.items()):
                if time.monotonic() - task.heard > TIME_LIMIT:
                    del running[answers]
                    ray.cancel(answers, force=True)
                    if task.place is not None:
                        _kill(ray, *task.place)
                        yield from _reschedule(task, waiting, job, f"hung for {TIME_LIMIT:g} s")
                    elif unstarted < RETRIES:
                        unstarted += 1
                        waiting.append(task.batch)
                    else:
                        raise ProLoRAError(f"no process of Ray has begun in {TIME_LIMIT:g} s")


def _work(batch: Batch, job: Job, mark: str) -> Iterator[Any]:
    """Moves a batch in a process of Ray: yields its node, then each outcome."""
    import ray

    node = f"{socket.gethostname()}, a node of the Ray cluster,"
    if job.version != __version__:
        raise ProLoRAError(f"{node} has prolora {__version__}, and not {job.version}")
    deadline = time.monotonic() + 5.0  # a network drive may take that long to show a new file
    while not os.path.exists(mark):
        if time.monotonic() > deadline:
            raise OutputError(f"{node} has another folder of the name {job.folder}")
        time.sleep(0.1)
    yield ray.get_runtime_context().get_node_id(), os.getpid()
    yield from move_batch(batch, job)


def _collect(
    ray: Any, answers: Any, running: dict[Any, _Running], waiting: deque[Batch], job: Job
) -> Iterator[Migrated]:
    task = running[answers]
    try:
        answer = ray.get(next(answers))
    except StopIteration:
        del running[answers]
        if task.left:
            yield from _reschedule(task, waiting, job, "ended early")
    except ray.exceptions.RayTaskError as error:  # ours, which the next batch would meet too
        raise getattr(error, "cause", None) or error from None
    except (ray.exceptions.LocalRayletDiedError, ray.exceptions.RaySystemError) as error:
        raise ProLoRAError(f"Ray itself ended on this machine: run again ({error})") from error
    except ray.exceptions.RayError as error:  # its process or its node ended
        del running[answers]
        yield from _reschedule(task, waiting, job, f"ended: {str(error).splitlines()[0]}")
    else:
        task.heard = time.monotonic()
        if isinstance(answer, Migrated):
            task.left.discard(answer.lora)
            yield answer
        else:
            task.place = answer


def _reschedule(task: _Running, waiting: deque[Batch], job: Job, why: str) -> Iterator[Migrated]:
    """Schedules LoRAs of a lost batch again, one at a time; refuses one that was alone."""
    left = [member for member in task.batch.loras if member[0] in task.left]
    log.warning("a process of Ray %s; %d LoRAs are tried again or refused", why, len(left))
    if len(task.batch.loras) == 1:
        for lora, _ in left:
            error = LostWorker(f"{lora}: the process that moved it {why}, each time")
            yield note_refusal(task.batch, job, Path(lora), error)
    else:
        waiting.extend(replace(task.batch, loras=(member,)) for member in left)


def _kill(ray: Any, node: str, process: int) -> None:
    """Ends a process, also one that is frozen and hears nothing."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    with suppress(Exception):  # it has ended, or its node has
        end = ray.remote(num_cpus=0, scheduling_strategy=there)(os.kill)
        ray.get(end.remote(process, 9), timeout=30)


@contextmanager
def _connect(address: str) -> Iterator[Any]:
    """Connects to Ray; a Ray started here ends with the body."""
    try:
        import ray
    except ImportError as error:
        raise ProLoRAError("Ray is missing: pip install ray") from error
    mine = not ray.is_initialized()
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        if mine:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (OSError, RuntimeError, ValueError) as error:
        raise ProLoRAError(f"Ray does not answer at {address}: {error}") from error
    try:
        yield ray
    finally:
        if mine:
            ray.shutdown()


@contextmanager
def _check_shared_folder(folder: Path) -> Iterator[Path]:
    """Makes a file that every node must see in the folder of the results."""
    mark = folder / f".prolora-{secrets.token_hex(8)}.tmp"
    put_text(mark, "")
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)
