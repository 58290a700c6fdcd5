"""A command line in a process of its own, what it left behind, and how that is counted.

A box is a folder with everything of one run: `in/` the inputs, `out/` the results, `cache/`, and
folders for the user's home and for temporary files. It has the same path in every run, since
reports hold paths. The process is forked from this one, which has imported all that is slow; its
memory and its time are bounded, and what it prints is kept.
"""

from __future__ import annotations

import faulthandler
import hashlib
import io
import json
import logging
import os
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import mini
import torch

from prolora import cli
from prolora.bases import leaves
from prolora.files.state import FileState

SECONDS = 12.0
"""A command that takes more waits for ever; waiting for a core does not count."""

MEGABYTES = 700
"""More than any command here needs; the address space has room for three times as much."""

GOOD = ("equal", "stated", "refused", "done")
Words = list[object]
_UNHANDLED, _SHOWN = 97, 4


@dataclass(frozen=True)
class Run:
    """A command that ended."""

    code: int  # its exit code; negative for the signal that ended it
    text: str  # what it printed
    megabytes: float  # how far its memory rose above that of this process
    hung: bool = False  # whether it was ended at its time limit


@dataclass
class Row:
    """The figures of one case of a harness."""

    harness: str
    case: str
    runs: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # verdict -> how many of them
    findings: list[dict[str, str]] = field(default_factory=list)  # the first of each bad verdict
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    scale: float = 1.0  # of its number of runs

    def random(self, *place: object) -> Random:
        """Random numbers that depend on the seed and the place alone: a case can be rerun."""
        return Random("/".join(map(ascii, (self.seed, *place))))

    def wants(self, *place: object) -> bool:
        """Whether a run is among those of a scale below 1."""
        return self.random(*place).random() < self.scale

    def count(self, most: int) -> int:
        return max(2, round(most * self.scale))

    def add(self, verdicts: Sequence[str], how: str, run: Run | None = None) -> None:
        self.runs += 1
        for verdict in dict.fromkeys(verdicts):
            self.counts[verdict] += 1
            if verdict not in GOOD and self.counts[verdict] <= _SHOWN:
                text = "" if run is None else run.text.strip()
                # Of one that waited, the innermost place comes first.
                said = text[:700] if run and run.hung else text[-700:]
                said = f"exit {run.code}: {said}" if run else ""
                self.findings.append({"verdict": verdict, "how": how, "said": said})

    @property
    def bad(self) -> int:
        return sum(number for verdict, number in self.counts.items() if verdict not in GOOD)

    def to_json(self) -> str:
        return json.dumps(vars(self) | {"bad": self.bad})

    @classmethod
    def from_json(cls, line: str) -> Row:
        facts = json.loads(line)
        del facts["bad"]
        return cls(**facts | {"counts": Counter(facts["counts"])})


class Box:
    """The folder of a run, made anew for each."""

    def __init__(self, work: Path) -> None:
        self.work, self.root = work, work / "box"
        self.out, self.inputs, self.cache = (self.root / n for n in ("out", "in", "cache"))
        self.canary, self.saved = work / "canary", 0

    def begin(self, template: Path | None = None) -> None:
        """Empties the box, and fills it with what `keep` returned."""
        if self.root.exists():
            shutil.rmtree(self.root)
        if template is not None:
            shutil.copytree(template, self.root, symlinks=True)
        for name in ("in", "out", "home", "tmp"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.canary.unlink(missing_ok=True)

    def keep(self) -> Path:
        """A copy of the box as it is, from which others begin."""
        self.saved += 1
        return Path(shutil.copytree(self.root, self.work / f"kept-{self.saved}", symlinks=True))

    def fill(self, *prepare: Callable[[Box], object]) -> Path:
        """Begins, prepares, and keeps."""
        self.begin()
        for step in prepare:
            step(self)
        return self.keep()

    def start(self, words: Sequence[object]) -> int:
        """Starts a command and returns its process."""
        return fork(lambda: self._run_main(words), self.work / "said")

    def run(self, *words: object, seconds: float = SECONDS) -> Run:
        # A fork begins without the pages of files, which are 400 MB with a torch for CUDA.
        began, before = time.monotonic(), (_pages(1) - _pages(2)) / 1024**2
        return wait(self.start(words), self.work / "said", began, before, seconds)

    def must(self, *words: object) -> Run:
        """Runs a command that has nothing to complain of: otherwise nothing here is tested.

        A migration with a refused LoRA in it says so in its exit code.
        """
        run = self.run(*words, seconds=10 * SECONDS)
        if run.hung or (run.code and not (run.code == 2 and words[0] == "migrate")):
            raise RuntimeError(f"{words} ended in {run.code}: {run.text}")
        return run

    def attack(
        self,
        row: Row,
        words: Sequence[object],
        how: str,
        judge: Callable[[Run], list[str]] | None = None,
        seconds: float = SECONDS,
        results: Path | None = None,
    ) -> None:
        """Runs a command and counts how it ended; `judge` looks at what ended as it should."""
        before = self.look(results)
        run = self.run(*words, seconds=seconds)
        verdicts = judge_ending(self, run, before, results)
        if not verdicts:
            verdicts = judge(run) if judge else ["refused" if run.code else "done"]
        row.add(verdicts, how, run)

    def _run_main(self, words: Sequence[object]) -> None:
        os.chdir(self.root)
        folders = {"HOME": "home", "XDG_CACHE_HOME": "home/.cache", "TMPDIR": "tmp"}
        os.environ |= {name: str(self.root / value) for name, value in folders.items()}
        os.environ |= {"PROLORA_CACHE": str(self.root / "home" / "cache"), "COLUMNS": "200"}
        os.environ |= {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
        tempfile.tempdir = None
        # A copy of a box goes on with the cache of the first: size and time alone name a file.
        leaves.SETTLING_TIME = -(10**18)
        FileState.from_status = lambda s: FileState(0, 0, s.st_size, s.st_mtime_ns, s.st_mtime_ns)
        sys.argv = ["prolora", *map(str, words)]
        cli.main()

    def look(self, results: Path | None = None) -> dict[str, str]:
        """What is in the box outside the results and the caches: path -> what it is."""
        mine = ((results or self.out).relative_to(self.root).as_posix(), "cache", "home/cache")
        return {
            name: what
            for name, what in look_at(self.root).items()
            if not any(name == folder or name.startswith(f"{folder}/") for folder in mine)
        }


def warm_up(box: Box) -> None:
    """Does once in this process what every forked one would else do first: imports, first calls."""
    torch.set_num_threads(1)  # a process with more cannot be forked
    box.begin()
    lora, source, target = mini.write_case(box.inputs)
    bases = ("--source", source, "--target", target)
    out, other = box.out / "moved.safetensors", box.out / "other.safetensors"
    for words in (
        ("transfer", lora, *bases, "-o", out, "--report", box.out / "report.json", "--card"),
        ("transfer", lora, *bases, "-o", other, "--method", "prolora", "--cache=none"),
        ("migrate", lora, *bases, "-o", box.out / "moved", "--cache=none"),
        ("check", lora),
    ):
        sys.argv = ["prolora", *map(str, words)]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            try:
                cli.main()
            except SystemExit as end:
                if end.code not in (None, 0, 3):  # 3: no known family
                    raise RuntimeError(f"{words} ended in {end.code}") from end


def fork(action: Callable[[], None], said: Path) -> int:
    """Does something in a new process, with bounded memory; what it prints goes to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 0
    try:
        os.setsid()
        log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        words = {"encoding": "utf-8", "errors": "replace", "closefd": False}
        sys.stdout, sys.stderr = (open(number, "w", **words) for number in (1, 2))
        logging.getLogger().handlers.clear()  # what was set up in this process writes elsewhere
        faulthandler.enable(file=sys.stderr)
        faulthandler.register(signal.SIGUSR1, file=sys.stderr)
        room = _pages(0) + 3 * MEGABYTES * 1024**2
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        action()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = _UNHANDLED
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def wait(pid: int, said: Path, began: float, before: float, seconds: float) -> Run:
    """Waits for a process; at the time limit it prints where it is, and is ended."""
    hung = False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        passed = time.monotonic() - began
        if not hung and passed > seconds and passed - _waited(pid) > seconds:
            hung = True
            os.kill(pid, signal.SIGUSR1)
            time.sleep(0.3)
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.001)
    text = said.read_text(errors="replace") if said.exists() else ""
    risen = max(0.0, usage.ru_maxrss / 1024 - before)
    return Run(os.waitstatus_to_exitcode(status), text, risen, hung)


def _waited(pid: int) -> float:
    """Seconds for which other processes had the core that this one wanted."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def _pages(column: int) -> int:
    """Bytes of the address space (0), what is resident of it (1), what files map of that (2)."""
    return int(Path("/proc/self/statm").read_text().split()[column]) * resource.getpagesize()


def look_at(folder: Path) -> dict[str, str]:
    """Path below a folder -> kind, and digest of the content or aim of the link; opens no pipe."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            large = path.lstat().st_size > 1 << 26
            what = str(path.lstat().st_size) if large else digest(path.read_bytes())
        else:
            what = os.readlink(path) if stat.S_ISLNK(mode) else oct(stat.S_IFMT(mode))
        found[path.relative_to(folder).as_posix()] = what
    return found


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def judge_ending(
    box: Box, run: Run, before: dict[str, str], results: Path | None = None
) -> list[str]:
    """The bad verdicts that need no comparison of results."""
    after = box.look(results)
    crashed = run.code == _UNHANDLED or (run.code < 0 and not run.hung)
    control = any((ord(c) < 32 and c not in "\n\r\t") or 127 <= ord(c) < 160 for c in run.text)
    new = {n for n in after.keys() - before.keys() if not n.startswith(("tmp", "home"))}
    verdicts = {
        "traceback": crashed or "Traceback (most recent call last)" in run.text,
        "hang": run.hung,
        "executed": box.canary.exists(),
        "lost": before.items() - after.items(),
        "outside": new,
        "memory": run.megabytes > MEGABYTES,
        "escape": control,
        "wordless": run.code > 0 and not run.text.strip(),
        "partial": list(box.root.rglob(".prolora-*.tmp")),
    }
    return [name for name, found in verdicts.items() if found]
