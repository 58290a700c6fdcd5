"""Writes python/prolora/__init__.pyi: the public names for type checkers, each option a keyword.

    python docs/make_stub.py [--check]

Names are loaded when they are asked for, and options are told in classes, so that no checker could
read either from the sources.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import prolora

STUB = Path(prolora.__file__).with_suffix(".pyi")
HEAD = '"""Written by docs/make_stub.py: the public names, typed."""\n'


def write_stub() -> str:
    """Returns the text of the stub."""
    homes: dict[str, str] = {}
    parts = []
    for name in prolora.__all__:
        home = f"prolora.{prolora._HOMES[name]}" if name in prolora._HOMES else "prolora.version"
        value = getattr(prolora, name)
        if inspect.isfunction(value) and "options" in inspect.signature(value).parameters:
            parts.append(_write_function(name, value, homes))
        else:
            homes[f"{name} as {name}"] = home
    imports: dict[str, list[str]] = defaultdict(list)
    for word, home in homes.items():
        if f"{word} as {word}" not in homes:
            imports[home].append(word)
    rooms = ", ".join(f"{room} as {room}" for room in prolora._ROOMS)
    lines = [HEAD, f"from prolora import {rooms}"]
    lines += [f"from {home} import {', '.join(sorted(names))}" for home, names in imports.items()]
    listed = "".join(f'    "{name}",\n' for name in prolora.__all__)
    return "\n".join([*lines, "", f"__all__ = [\n{listed}]\n", *parts])


def _write_function(name: str, function: Any, homes: dict[str, str]) -> str:
    """Writes a function with its options, and notes where the names of its types come from."""
    parameters, star = [], False
    signature = inspect.signature(function)
    kind = type(signature.parameters["options"].default)
    owners = {
        field.name: owner.__module__
        for owner in reversed(kind.__mro__)
        if dataclasses.is_dataclass(owner)
        for field in dataclasses.fields(owner)
        if field.name in inspect.get_annotations(owner)
    }
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parameters.append("*")
            star = True
        own = parameter.name in inspect.signature(function.__wrapped__).parameters
        home = function.__module__ if own else owners[parameter.name]
        _note_names(str(parameter.annotation), home, homes)
        default = "" if parameter.default is parameter.empty else " = ..."
        parameters.append(f"{parameter.name}: {parameter.annotation}{default}")
    _note_names(str(signature.return_annotation), function.__module__, homes)
    inside = "".join(f"    {text},\n" for text in parameters)
    return f"def {name}(\n{inside}) -> {signature.return_annotation}: ...\n"


def _note_names(annotation: str, home: str, homes: dict[str, str]) -> None:
    """Notes where the names of an annotation are defined, that are no builtins."""
    for word in re.findall(r"[A-Za-z_]\w*", annotation):
        if word in vars(sys.modules[home]):
            homes.setdefault(word, _find_home(word, home))


def _find_home(word: str, module: str) -> str:
    """Follows imports to the module that defines a name."""
    source = importlib.util.find_spec(module)
    if not module.startswith("prolora") or source is None or source.origin is None:
        return module
    package = module if source.submodule_search_locations else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(Path(source.origin).read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and word in [alias.name for alias in node.names]:
            name = "." * node.level + (node.module or "")
            return _find_home(word, importlib.util.resolve_name(name, package))
    return module


def main() -> int:
    """Writes the stub, or says that it is stale."""
    text = write_stub()
    if "--check" in sys.argv:
        return int(not STUB.exists() or STUB.read_text("utf-8") != text)
    STUB.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
