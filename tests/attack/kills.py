"""SIGKILL at any moment, then the same command again.

After a kill whatever has the name of a result is whole: the result of an uninterrupted run, or what
was there before. The command is then run until it ends by itself, and what lies there is what an
uninterrupted run leaves, bit by bit; reports, which hold times, are read instead. One kill in five
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import damage
import fleet_files
from contents import read_bytes
from foreign import write_lora
from hostile import bases
from safetensors.torch import save_file
from sandbox import Box, Row, choose, judge_ending, wait

Words = list[object]


@dataclass(frozen=True)
class Scenario:
    """A command that is killed."""

    name: str  # of the case
    prepare: Callable[[Box], None]  # fills the box
    command: Callable[[Box], Words]  # what is killed, and run again
    kills: int  # how many at scale 1
    # by which share of the kills the command is killed once more before it may end
    again: float = 0.0


def write_loras(box: Box) -> None:
    """Bases, and eight LoRAs."""
    damage.write_case(box)
    (box.inputs / "loras").mkdir()
    for number in range(8):
        lora = fleet_files.some_tensors(1 + number, 12)
        save_file(lora, box.inputs / "loras" / f"{number}.safetensors")


def write_old(box: Box) -> None:
    """A LoRA, and what it became an earlier time by another method."""
    damage.write_case(box)
    box.must(*replace_result(box, "copy"))


def write_old_folder(box: Box) -> None:
    """The same as a PEFT folder, with a file of the user's."""
    damage.write_case(box)
    box.must(*replace_folder(box, "copy"))
    write_lora(box.out / "moved" / "mine.safetensors")


def replace_result(box: Box, method: str = "prolora") -> Words:
    words = damage.transfer(box, "--method", method, "--rank", "4", "--card", "--overwrite")
    return [*words, "--cache", box.cache]


def replace_folder(box: Box, method: str = "prolora") -> Words:
    words = damage.transfer(
        box, "--method", method, "--rank", "4", "--format", "peft", "--overwrite"
    )
    words[words.index("-o") + 1] = box.out / "moved"
    return [*words, "--cache", box.cache]


def move_batch(box: Box) -> Words:
    loras = sorted((box.inputs / "loras").iterdir())
    return ["transfer", *loras, *bases(box), "-o", box.out / "moved", "--cache", box.cache]


def migrate(box: Box) -> Words:
    return [*damage.migrate(box)[0][:-1], "--cache", box.cache]


SCENARIOS = (
    Scenario("transfer of one", damage.write_case, replace_result, 120),
    Scenario("transfer over an older result", write_old, replace_result, 120),
    Scenario("transfer into a PEFT folder", write_old_folder, replace_folder, 120),
    Scenario("transfer of eight", write_loras, move_batch, 80, 0.5),
    Scenario("migrate", damage.write_collection, migrate, 80, 0.5),
    Scenario("fit with resume", damage.write_pipelines, lambda box: damage.fit(box)[0], 16, 0.4),
)
_LONGEST = 4
"""Most kills of one run."""


def run_scenario(scenario: Scenario, box: Box, scale: float, seed: int) -> Row:
    """Kills a command again and again, each time from the beginning."""
    row = Row("kills", scenario.name)
    box.begin()
    scenario.prepare(box)
    template = box.keep()
    old, began = read_kept(box.out), time.monotonic()
    box.must(*scenario.command(box))
    lasts = time.monotonic() - began
    new = read_kept(box.out)
    signals: Counter[str] = Counter()
    for number in range(max(2, round(scenario.kills * scale))):
        random = choose(seed, scenario.name, number)
        box.begin(template)
        before, verdicts, told = box.look(), [], []
        for _ in range(_LONGEST):
            ending = signal.SIGTERM if random.random() < 0.2 else signal.SIGKILL
            left = list_temporaries(box)
            how = kill(box, scenario.command(box), ending, lasts, random)
            told.append(how)
            if how == "ended first":
                break
            signals[ending.name] += 1
            verdicts += judge_kill(box, old, new)
            if ending is signal.SIGTERM and list_temporaries(box) - left:
                verdicts.append("partial")
            if random.random() >= scenario.again:
                break
        # What was killed may have left temporary files, which a later run removes.
        left = list_temporaries(box)
        run = box.run(*scenario.command(box), seconds=60)
        ending_verdicts = judge_ending(box, run, before)
        if "partial" in ending_verdicts and list_temporaries(box) <= left:
            ending_verdicts.remove("partial")
        verdicts += ending_verdicts + judge_end(box, new)
        if run.code not in (0, 2 if scenario.name == "migrate" else 0):  # of which one is no LoRA
            verdicts.append("lost")
        signals["resumed"] += was_resumed(box.out / "report.json")
        row.add(verdicts or ["equal"], f"{number}: {', '.join(told)}", run)
    row.facts |= {name: number for name, number in signals.items() if number}
    return row


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
    try:
        os.kill(pid, ending)
    except ProcessLookupError:
        pass
    run = wait(pid, box.work / "said", began, 0.0, 30.0)
    if run.code >= 0 and ending is signal.SIGKILL:
        return "ended first"
    return f"{ending.name} after {when:.3f} s" + (" while it wrote" if writing else "")


def read_kept(out: Path) -> dict[str, bytes]:
    """What must be the same bits after every run: results."""
    files = read_bytes(out)
    results = [name for name in files if name.endswith(".safetensors") and ".prolora-" not in name]
    return {name: files[name] for name in results}


def list_temporaries(box: Box) -> set[Path]:
    """What a command builds before it has its name."""
    return set(box.root.rglob(".prolora-*.tmp"))


def judge_kill(box: Box, old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    """What a killed command may not leave."""
    verdicts = []
    files = read_bytes(box.out)
    for name, data in files.items():
        if ".prolora-" in name:
            continue
        if name.endswith(".safetensors"):
            if data not in (old.get(name), new.get(name)):
                verdicts.append("partial")
        elif not is_whole(name, data):
            verdicts.append("partial")
    if old.keys() - files.keys():
        verdicts.append("lost")
    return verdicts


def is_whole(name: str, data: bytes) -> bool:
    """Whether a text of prolora is complete."""
    try:
        if name.endswith(".json"):
            lines = [data.decode()]
        elif name.endswith(".html"):
            return data.rstrip().endswith(b"</html>")
        elif name.endswith(".md"):
            return b"SHA-256" in data and data.endswith(b"\n")
        else:
            return True
        return all(isinstance(json.loads(line), dict | list) for line in lines)
    except ValueError:
        return False


def judge_end(box: Box, new: dict[str, bytes]) -> list[str]:
    """What a command that ended by itself must leave, after any number of kills."""
    found, verdicts = read_kept(box.out), []
    if new.keys() - found.keys():
        verdicts.append("lost")
    if any(data != new.get(name) for name, data in found.items()):
        verdicts.append("silent")
    texts = {n: data for n, data in read_bytes(box.out).items() if ".prolora-" not in n}
    if any(not is_whole(name, data) for name, data in texts.items()):
        verdicts.append("partial")
    return verdicts


def was_resumed(report: Path) -> bool:
    """Whether a fit says that it went on from something that was kept."""
    try:
        probe = json.loads(report.read_text())["probe"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return bool(probe and probe.get("resumed"))


def list_cases() -> dict[str, Callable[[Box, float, int], Row]]:
    """Name -> what runs it."""
    return {scenario.name: partial(run_scenario, scenario) for scenario in SCENARIOS}
