"""Every option of every verb and command, with values that nobody should give it.

A verb returns a result, or raises an error of prolora's whose sentence says what it takes; an
argument that is no option (a LoRA, a base, a path) may raise Python's own TypeError or ValueError.
A command ends in an exit code of its table, with a sentence and without a traceback.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import typer
from mini import lora_tensors, target_weights, write_case, write_folder
from safetensors.torch import save_file

import prolora
from prolora import cli
from prolora.cli.app import app
from prolora.cli.exits import ExitCode

if TYPE_CHECKING:
    from sandbox import Box, Row

VERBS = ("transfer", "transfer_many", "fit", "fit_many", "convert", "merge", "extract", "bake")
VERBS += ("migrate", "check")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
NUMBERS = [-1, 0, 0.5, 5e-324, 1e308, 10**400, 2**63, float("nan"), float("inf"), -float("inf")]
TEXTS = ["", "x", "\0", "9" * 309, "1e400", "nan", "-1"]
THINGS = [None, True, *NUMBERS, *TEXTS, [], {}, (), b"x", (1,), ["x"], {"a": None}, 1 + 1j]
THINGS += [object(), lambda *_: None]
NUMBERED = count()
"""Of outputs, so that none exists."""
WORDS = ["", "x", "nan", "-1", "0", "1e999", "5e-324", "9" * 309, "½", "inf", ",;=", "a/b@c"]
WORDS += ["../x"]
TO_BASES = ["LORA", "--source", "SOURCE", "--target", "TARGET"]
LINES = {
    "convert": ["LORA"],
    "merge": ["LORA", "SECOND"],
    "check": ["LORA"],
    "extract": ["TARGET", "TUNED"],
    **{name: [*TO_BASES, "--dry-run"] for name in ("transfer", "fit", "migrate")},
}


def write_files(folder: Path) -> None:
    """Writes what each verb takes: two LoRAs, two bases, and a fine-tune of the second."""
    write_case(folder)
    save_file(lora_tensors(rank=2), folder / "second.safetensors")
    write_folder(folder / "tuned", target_weights(drift=0.2))


def list_keywords() -> Iterator[tuple[str, str]]:
    """Every keyword of the verbs."""
    for name in VERBS:
        taken = inspect.signature(getattr(prolora, name)).parameters.values()
        yield from ((name, one.name) for one in taken if one.kind is not one.VAR_KEYWORD)


def try_keyword(folder: Path, name: str, keyword: str, thing: object) -> str:
    """Calls a verb with one value; "done", "refused", or what is wrong."""
    verb, taken = getattr(prolora, name), inspect.signature(getattr(prolora, name)).parameters
    lora, second = (folder / f"{part}.safetensors" for part in ("lora", "second"))
    source, target, tuned = (folder / part for part in ("source", "target", "tuned"))
    usual = {"lora": lora, "loras": [lora, second], "source": source, "target": target}
    usual |= {"base": target, "tuned": tuned, "folder": folder / f"out {next(NUMBERED)}"}
    usual |= {"out": folder / f"{next(NUMBERED)}.safetensors", "dry_run": True}
    if name in ("convert", "check"):
        usual = {"lora": lora}
    if name in ("merge", "bake"):
        usual |= {"target": None, "base": source, "loras": [lora, second]}
    if name == "bake":
        usual["out"] = folder / f"baked {next(NUMBERED)}"
    given: dict[str, Any] = {key: x for key, x in usual.items() if key in taken}
    is_option = any(
        keyword in {field.name for field in dataclasses.fields(one.default)}
        for one in taken.values()
        if dataclasses.is_dataclass(one.default)
    )
    try:
        verb(**given | {keyword: thing})
    except prolora.ProLoRAError as error:
        return "refused" if str(error) else "wordless"
    except (TypeError, ValueError) as error:
        return f"bare {error!r}" if is_option or not str(error) else "refused"
    except Exception as error:
        return f"bare {error!r}"
    return "done"


def list_words() -> Iterator[tuple[str, str, str | None]]:
    """Every option of the commands with every word; a flag once."""
    for name, command in COMMANDS.items():
        for option in command.params if name != "demo" else ():
            if option.param_type_name == "option":
                words = [None] if getattr(option, "is_flag", False) else WORDS
                yield from ((name, option.opts[0], word) for word in words)


def try_word(folder: Path, name: str, option: str, word: str | None) -> str:
    """Runs a command with one value; "done", "refused", or what is wrong."""
    places = {"LORA": "lora.safetensors", "SECOND": "second.safetensors"}
    places |= {name.upper(): name for name in ("source", "target", "tuned")}
    line = [str(folder / places[part]) if part in places else part for part in LINES.get(name, [])]
    if name in LINES and name != "check":
        line += ["-o", str(folder / f"{next(NUMBERED)}" / "x.safetensors")]
    said, told, code, before = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = ["prolora", name, *line, option, *([] if word is None else [word])]
    try:
        with redirect_stdout(said), redirect_stderr(told):
            cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        return f"bare {error!r}"
    finally:
        sys.argv = before
    allowed = set(ExitCode) - {ExitCode.INTERRUPTED, ExitCode.TERMINATED}
    if code not in allowed or "Traceback" in told.getvalue():
        return f"code {code}: {told.getvalue()[-300:]}"
    if code not in (0, 3, 4) and not told.getvalue().strip():
        return "wordless"
    if word != "nan" and re.search(r"\bnan\b", said.getvalue().lower()):
        return "nan in the output"
    return "refused" if code else "done"


def run_case(name: str, box: Box, row: Row) -> None:
    """All values of one verb or command; fewer at a scale below 1."""
    box.begin()
    write_files(box.inputs)
    cases: list[tuple[str, Callable[[], str]]] = [
        (f"{verb}({key}={thing!r:.40})", partial(try_keyword, box.inputs, verb, key, thing))
        for verb, key in list_keywords()
        for thing in THINGS
        if verb == name
    ]
    cases += [
        (f"prolora {command} {option} {word!r:.40}", partial(try_word, box.inputs, *rest))
        for rest in list_words()
        for command, option, word in [rest]
        if f"prolora {command}" == name
    ]
    os.chdir(box.out)
    for how, run in Random(row.seed).sample(cases, max(1, int(min(1, row.scale) * len(cases)))):
        verdict = run()
        bad = {"wordless": "wordless"}.get(verdict, "traceback")
        row.add([verdict if verdict in ("done", "refused") else bad], f"{how}: {verdict}")
    os.chdir(box.work.parent)  # the box will be gone


NAMES = (*VERBS, *(f"prolora {name}" for name in COMMANDS if name != "demo"))
CASES = {name: partial(run_case, name) for name in NAMES}
