"""A step: a piece of a call that is run as a whole, or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .machine import ROOT
from .results import append_line


@dataclass(frozen=True)
class Step:
    """One piece of a call."""

    name: str  # unique within the call
    seconds: float  # what it is expected to take at most; it is not begun with less time left
    run: Callable[[Bench], None]  # records its numbers in the Bench that it is given
    tool: str = ""  # a program that it needs; without that it fails


@dataclass
class Bench:
    """What a step works with."""

    call: str  # its call
    out: Path  # the folder of the results
    machine: dict[str, str]  # the fields of a line that `describe_machine` gives
    command: str  # by which the numbers can be had again
    dry: bool  # on the CPU at toy size: nothing that is recorded means anything
    step: str = ""  # the name of the step that is running

    @property
    def device(self) -> str:
        """Where to compute."""
        return "cpu" if self.dry else "cuda"

    @property
    def results(self) -> Path:
        """The file that every number is appended to."""
        return self.out / "results.jsonl"

    @property
    def logs(self) -> Path:
        """Files that are too long for it, beside `out`: few files come back from some machines."""
        folder = self.out.with_name(f"{self.out.name}-logs")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def size(self, n: int) -> int:
        """A dimension: n, or a toy's."""
        return max(8, n // 32) if self.dry else n

    def batch(self, b: int) -> int:
        """How many matrices: b, or a toy's."""
        return min(b, 2) if self.dry else b

    def record(
        self, name: str, value: float | None, unit: str, case: str = "", **further: Any
    ) -> None:
        """Appends a number to the results and prints it."""
        fields = {"repeats": 1, **further}
        if self.dry:
            fields["dry"] = True
        line = {"call": self.call, "step": self.step, "name": name, "value": value, "unit": unit}
        line |= {"case": case, **fields, **self.machine, "command": self.command}
        if value is not None and not abs(value) < float("inf"):
            line |= {"value": None, "error": f"{value}"}
        append_line(self.results, line)
        text = "–" if line["value"] is None else f"{value:.4g} {unit}"
        print(
            f"{name}{f' [{case}]' if case else ''}: {text} {further.get('error', '')}", flush=True
        )

    def require(
        self, name: str, value: float, limit: float, unit: str = "", case: str = "", note: str = ""
    ) -> None:
        """Records a number that must not exceed a limit."""
        self.record(name, value, unit, case, limit=limit, **({"note": note} if note else {}))
        assert value <= limit, f"{name} is {value:.3g}, and may be {limit:.3g} at most"

    def run_command(
        self,
        log: str,
        *command: str | Path,
        seconds: float = 120,
        cwd: Path = ROOT,
        **environment: str,
    ) -> tuple[int, str]:
        """Exit code and output of a program; the output goes into the logs too."""
        try:
            done = subprocess.run(
                [str(word) for word in command],
                cwd=cwd,
                env={**os.environ, **environment},
                text=True,
                errors="replace",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            )
            code, text = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            output = error.stdout or ""
            text = output.decode(errors="replace") if isinstance(output, bytes) else output
            code = 124
        (self.logs / log).write_text(text)
        return code, text


def has_tool(name: str) -> bool:
    """Whether a program is installed; none named is."""
    return not name or shutil.which(name) is not None


def make_weights(b: int, m: int, n: int, device: str, decay: float = 0.5, seed: int = 0) -> Any:
    """W [b, m, n], float32, σ_i = i^-decay, with random singular vectors, made on `device`."""
    d = min(m, n)
    generator = torch.Generator().manual_seed(seed)
    made = torch.empty(b, m, n, device=device)
    sigma = torch.arange(1, d + 1, device=device) ** -decay
    for i in range(b):
        u, v = (
            torch.linalg.qr(torch.randn(size, d, generator=generator).to(device))[0]
            for size in (m, n)
        )
        torch.mm(u * sigma, v.mT, out=made[i])
    return made
