"""No value of any option, and of no keyword, ends in anything but a result or a sentence."""

import dataclasses
import inspect
import re

import pytest
import typer
from mini import write_case
from property_examples import AT_NIGHT

import prolora as package
from prolora.cli.app import app
from prolora.cli.exits import ExitCode

COMMANDS = typer.main.get_command(app).commands
WORDS = ["", "x", "nan", "-1", "0", "1e999", "9" * 309, "½", "inf", ",;=", "a/b@c", "../x"]
THINGS = [None, "", "x", -1, 0, 0.5, float("nan"), float("inf"), 10**400, True, [], {}, b"x", (1,)]
THINGS += [object(), "9" * 309, "\0", ["x"], {"a": None}, 1 + 1j]
DRY = ("transfer", "fit", "migrate")
LINES = {
    "convert": ["LORA"],
    "merge": ["LORA", "LORA"],
    "check": ["LORA"],
    "extract": ["SOURCE", "TARGET"],
    **{name: ["LORA", "--source", "SOURCE", "--target", "TARGET"] for name in DRY},
}


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"demo"}))
def test_no_value_of_an_option_ends_in_a_traceback_or_another_code(
    name, prolora, case, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    paths = dict(zip(("LORA", "SOURCE", "TARGET"), map(str, case), strict=True))
    line = [paths.get(word, word) for word in LINES.get(name, [])]
    line += ["--dry-run"] * (name in DRY)
    options = [p for p in COMMANDS[name].params if p.param_type_name == "option"]
    for number, option in enumerate(options):
        some = WORDS if AT_NIGHT else WORDS[number % 4 :: 4]
        for word in [None] if getattr(option, "is_flag", False) else some:
            given = [option.opts[0], *([word] if word is not None else [])]
            if name in LINES and name != "check":
                given += ["-o", tmp_path / f"{number}" / "x.safetensors"]
            code, said, told = prolora(name, *line, *given)
            where = f"{name} {' '.join(map(str, given))}: {code} {told[-300:]}"
            assert code in set(ExitCode) - {ExitCode.INTERRUPTED, ExitCode.TERMINATED}, where
            assert code in (0, 3, 4) or told.strip(), where
            assert "Traceback" not in told, where
            assert word == "nan" or not re.search(r"\bnan\b", said.lower()), where


def list_keywords():
    """Every keyword of the verbs: of their signatures, and of the options that they take."""
    for name in (
        "transfer",
        "transfer_many",
        "fit",
        "convert",
        "merge",
        "extract",
        "migrate",
        "check",
    ):
        accepted = inspect.signature(getattr(package, name)).parameters
        keywords = {key for key, known in accepted.items() if known.kind.name != "VAR_KEYWORD"}
        for known in accepted.values():
            if dataclasses.is_dataclass(known.default):
                keywords |= {field.name for field in dataclasses.fields(known.default)}
        yield from ((name, keyword) for keyword in sorted(keywords))


@pytest.mark.parametrize(("name", "keyword"), list(list_keywords()))
def test_no_value_of_a_keyword_ends_in_a_bare_error(name, keyword, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora, source, target = write_case(tmp_path)
    verb = getattr(package, name)
    usual = {
        "lora": lora,
        "loras": [lora, lora],
        "source": source,
        "target": target,
        "base": source,
        "tuned": target,
        "folder": tmp_path / "out",
        "out_folder": tmp_path / "out",
    }
    accepted = inspect.signature(verb).parameters
    given = {k: v for k, v in usual.items() if k in accepted and k != keyword}
    if name in ("convert", "check"):
        given = {"lora": lora} if keyword != "lora" else {}
    dry = {"dry_run": True} if "dry_run" in accepted and keyword != "dry_run" else {}
    for thing in THINGS:
        try:
            done = verb(**given, **dry, **{keyword: thing})
            if inspect.isgenerator(done):
                list(done)
        except package.ProLoRAError as error:
            assert str(error), thing
        except (TypeError, AttributeError):
            # Of another type Python itself says so; what is called has no text for a value.
            assert not isinstance(thing, str) or keyword in ("naming", "progress")
