"""Registers, memory and spills of the kernels in an extension, as cuobjdump tells them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from shutil import which


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture; bytes but for the registers."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    local: int


def parse_resources(text: str) -> Iterator[Resources]:
    """What `cuobjdump --dump-resource-usage` prints."""
    architecture = kernel = ""
    for line in text.splitlines():
        if match := re.search(r"\barch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+?):?\s*$", line):
            kernel = match[1]
        elif "REG:" in line and kernel:
            numbers = dict(re.findall(r"\b([A-Z]+):(\d+)", line))
            yield Resources(
                shorten(kernel),
                architecture,
                int(numbers["REG"]),
                int(numbers.get("SHARED", 0)),
                # STACK alone is for calls; LOCAL is what did not fit the registers.
                int(numbers.get("LOCAL", 0)),
            )
            kernel = ""


def shorten(name: str) -> str:
    """The name without namespaces and arguments, if c++filt is there."""
    if which("c++filt"):
        done = subprocess.run(["c++filt", name], capture_output=True, text=True, check=False)
        name = done.stdout.strip() or name
    name = re.sub(r"\(anonymous namespace\)::|prolora::|^void ", "", name)
    return re.sub(r"\((?!.*<).*$", "", name)[:80]
