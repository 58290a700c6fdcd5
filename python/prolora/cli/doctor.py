"""What an installation has, what it lacks, and how to get that."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from rich.table import Table

from ..bases.cache.basis_cache import default_folder
from ..bases.cache.cache_folder import measure_cache
from ..core.ops import native
from ..files.sizes import format_size
from ..version import __version__
from .console import answer, out
from .flags import JsonOption
from .tables import draw_facts

# Extras for people who develop prolora.
_FOR_DEVELOPERS = frozenset({"dev", "study", "test"})
_REQUIREMENT = re.compile(r"([\w.-]+).*extra\s*==\s*[\"']([\w-]+)[\"']")


@dataclass(frozen=True)
class Extra:
    """An optional part of prolora."""

    name: str  # as pip takes it
    packages: dict[str, str | None]  # package -> its version, None where it is missing

    def describe(self) -> str:
        """Says whether it works; if not, how to install it."""
        missing = [package for package, version in self.packages.items() if version is None]
        if missing:
            return f"no {', '.join(missing)} (pip install 'prolora[{self.name}]')"
        return ", ".join(f"{package} {version}" for package, version in self.packages.items())


def describe_kernels() -> dict[str, str | int | bool]:
    """Versions, and what runs the native ops."""
    return {
        "prolora": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu threads": torch.get_num_threads(),
        "torch sees a GPU": torch.cuda.is_available(),
        **native.describe_installation(),
    }


def describe_surroundings() -> dict[str, str | int]:
    """Describes memory, cache and extras."""
    facts: dict[str, str | int] = {"memory": _describe_memory()}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        facts["GPU memory"] = f"{format_size(free)} free of {format_size(total)}"
    facts["cache"] = describe_cache(default_folder())
    for extra in list_extras():
        facts[f"extra {extra.name}"] = extra.describe()
    return facts


def tell_verdict() -> str:
    """Tells whether LoRAs can be moved here, and where it is computed."""
    cores = f"computing on {os.cpu_count()} cores"
    where = "A GPU will compute" if torch.cuda.is_available() else f"No GPU: {cores}"
    if native.describe_installation().get("compiled extension"):
        return f"✔ Everything that moving LoRAs needs is here. {where}."
    return f"✔ LoRAs can be moved here, in part more slowly: no extension is compiled. {where}."


def list_extras() -> list[Extra]:
    """Lists the extras for users, from prolora's own metadata, if installed."""
    try:
        requirements = metadata.requires("prolora") or []
    except metadata.PackageNotFoundError:
        return []
    extras: dict[str, dict[str, str | None]] = {}
    for requirement in requirements:
        match = _REQUIREMENT.match(requirement)
        if match and match[2] not in _FOR_DEVELOPERS:
            extras.setdefault(match[2], {})[match[1]] = _find_version(match[1])
    return [Extra(name, packages) for name, packages in sorted(extras.items())]


def _find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_cache(folder: Path) -> str:
    """Describes the basis cache: path, size, free space on its disk."""
    try:
        size = measure_cache(folder)
        parent = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(parent).free
    except OSError as error:
        return f"{folder}: cannot be read: {error.strerror}"
    if not os.access(parent, os.W_OK):
        return f"{folder}: cannot be written (--cache or PROLORA_CACHE names another folder)"
    return f"{folder}: {format_size(size)}, {format_size(free)} free on the disk"


def _describe_memory() -> str:
    """Describes the memory, if the system says."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return "not known"
    return format_size(total)


def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, what is missing and how to get it: kernels, extras, memory, cache."""
    facts = describe_kernels() | describe_surroundings()
    if as_json:
        answer.give(facts)
    else:
        out.print(tell_verdict(), style="bold")
        out.print(facts_table(facts))


def facts_table(facts: Mapping[str, object]) -> Table:
    """Writes a line for each fact; a reason that several have is given once."""
    lines, given = [], set[str]()
    for name, value in facts.items():
        text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
        for reason in set(re.findall(r" \(.+?\)", text)) & given:
            text = text.replace(reason, "")
        given |= set(re.findall(r" \(.+?\)", text))
        lines.append((name, text))
    return draw_facts(lines)
