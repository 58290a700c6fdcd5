"""SIGKILL at any moment, then the same command again.

After a kill whatever has the name of a result is whole: the result of an uninterrupted run, or what
was there before. The command is then run until it ends by itself, and what is there is what an
uninterrupted run leaves, bit by bit; reports, which have times, are read instead. One kill in five
is a SIGTERM, after which no temporary file may be left. Half of the kills come when a temporary
file is there, so that they meet the writing.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from sandbox import Box, Row, Words, judge_ending, wait

MOST_KILLS = 4
"""Of one run."""


@dataclass(frozen=True)
class Kills:
    """A command that is killed."""

    prepare: Callable[[Box], object]  # fills the box
    command: Callable[[Box], Words]  # what is killed, and run again
    kills: int  # how many at scale 1
    again: float = 0.0  # by which share it is killed once more before it may end
    codes: tuple[int, ...] = (0,)  # how it may end by itself

    def __call__(self, box: Box, row: Row) -> None:
        """Kills a command again and again, each time from the beginning."""
        template = box.fill(self.prepare)
        old, began = read_results(box.out), time.monotonic()
        box.must(*self.command(box))
        lasts, new = time.monotonic() - began, read_results(box.out)
        signals: Counter[str] = Counter()
        for number in range(row.count(self.kills)):
            random = row.random(row.case, number)
            box.begin(template)
            before, verdicts, told = box.look(), [], []
            for _ in range(MOST_KILLS):
                ending = signal.SIGTERM if random.random() < 0.2 else signal.SIGKILL
                left = list_temporaries(box)
                told.append(kill(box, self.command(box), ending, lasts, random))
                if told[-1] == "ended first":
                    break
                signals[ending.name] += 1
                verdicts += judge_files(box, old, new)
                if ending is signal.SIGTERM and list_temporaries(box) - left:
                    verdicts.append("partial")
                if random.random() >= self.again:
                    break
            # What was killed may have left temporary files, which a later run removes.
            left = list_temporaries(box)
            run = box.run(*self.command(box), seconds=60)
            endings = judge_ending(box, run, before)
            if list_temporaries(box) <= left:
                endings = [verdict for verdict in endings if verdict != "partial"]
            verdicts += endings + judge_files(box, new, new)
            if run.code not in self.codes:
                verdicts.append("lost")
            signals["resumed"] += was_resumed(box.out / "report.json")
            row.add(verdicts or ["equal"], f"{number}: {', '.join(told)}", run)
        row.facts |= {name: number for name, number in signals.items() if number}


def kill(box: Box, words: Words, ending: signal.Signals, lasts: float, random: Random) -> str:
    """Starts a command and ends it at a random moment, or a little after a file is begun."""
    writing, share = random.random() < 0.5, random.random()
    began, pid = time.monotonic(), box.start(words)
    moment = began + share * lasts * 1.1
    while time.monotonic() < (began + 20 * lasts if writing else moment):
        if writing and next(box.root.rglob(".prolora-*.tmp"), None):
            time.sleep(share * 0.004)
            break
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.0002)
    when = time.monotonic() - began
    with suppress(ProcessLookupError):
        os.kill(pid, ending)
    run = wait(pid, box.work / "said", began, 0.0, 30.0)
    if run.code >= 0 and ending is signal.SIGKILL:
        return "ended first"
    return f"{ending.name} after {when:.3f} s" + (" while it wrote" if writing else "")


def read_files(out: Path) -> dict[str, bytes]:
    """Name below a folder -> content, of all files but those that are not done."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    read = {path.relative_to(out).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in read.items() if ".prolora-" not in name}


def read_results(out: Path) -> dict[str, bytes]:
    """What must be the same bits after every run."""
    return {n: data for n, data in read_files(out).items() if n.endswith(".safetensors")}


def list_temporaries(box: Box) -> set[Path]:
    return set(box.root.rglob(".prolora-*.tmp"))


def judge_files(box: Box, old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    """What neither a killed command nor one that ended (of which `old` is `new`) may leave."""
    files, ended = read_files(box.out), old is new
    results = {name: data for name, data in files.items() if name.endswith(".safetensors")}
    verdicts = ["lost"] if old.keys() - files.keys() else []
    if any(data not in (old.get(name), new.get(name)) for name, data in results.items()):
        verdicts.append("silent" if ended else "partial")
    if not all(is_whole(name, data) for name, data in files.items()):
        verdicts.append("partial")
    return verdicts


def is_whole(name: str, data: bytes) -> bool:
    """Whether a text of prolora is complete."""
    if name.endswith(".html"):
        return data.rstrip().endswith(b"</html>")
    if name.endswith(".md"):
        return b"SHA-256" in data and data.endswith(b"\n")
    try:
        return not name.endswith(".json") or isinstance(json.loads(data), dict | list)
    except ValueError:
        return False


def was_resumed(report: Path) -> bool:
    """Whether a fit says that it went on from something that was kept."""
    try:
        return bool(json.loads(report.read_text())["probe"].get("resumed"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
