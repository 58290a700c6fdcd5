"""One message, three readers: Python reads the argument, a shell the flag, a node the widget."""

import ast
import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import structure
import typer
from mini import write_case

import prolora
from prolora.adapters.formats import programs
from prolora.cli.app import app
from prolora.cli.flags import list_options, write_flag
from prolora.errors import name_options
from prolora.making.convert import ConvertOptions

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"

NAMED = re.compile(r"`([a-z_]+)(=[^`]*|\(\))?`")


@pytest.fixture(scope="module")
def words():
    """The words of the ComfyUI nodes; the rest of the pack needs ComfyUI."""
    spec = importlib.util.spec_from_file_location("words_of_nodes", PACK / "words.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def list_messages():
    """(file, text) of every text of the library that is no docstring."""
    for file, tree in structure.parse_files().items():
        docs = {id(node.value) for node in structure.walk(tree) if isinstance(node, ast.Expr)}
        for node in structure.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) not in docs:
                    yield file, node.value


def list_flags():
    """Every flag of every command."""
    flags = set()
    commands = [typer.main.get_command(app)]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        flags |= {flag for option in command.params for flag in option.opts}
    return flags


def test_every_option_that_a_message_names_is_one_in_python_and_a_flag():
    named = {
        (match[1], match[2] or "")
        for file, text in list_messages()
        if file.parts[0] != "cli"
        for match in NAMED.finditer(text)
    }
    assert len(named) > 15
    fields = dataclasses.fields(prolora.TransferOptions)
    unflagged = {field.name for field in fields if not field.metadata["shown"].panel}
    options, flags = list_options(), list_flags()
    for name, value in named:
        if value == "()":
            assert callable(getattr(prolora, name))
            continue
        # A name alone may also be of something else in Python.
        assert name in options | unflagged or not value, name
    for option in options:
        assert write_flag(option) in flags, option
    keywords = {field.name for field in dataclasses.fields(prolora.TransferOptions)}
    for function in (prolora.check, prolora.migrate):
        keywords |= set(inspect.signature(function).parameters)
    for taken in (prolora.FitOptions, prolora.MergeOptions, ConvertOptions):
        keywords |= {field.name for field in dataclasses.fields(taken)}
    told = {name for name, value in named if value != "()" and (value or name in options)}
    assert told <= keywords


@pytest.mark.parametrize(
    ("message", "flag"),
    [
        ("`match='name'` pairs it", "--match name pairs it"),
        (
            "&#x27;x&#x27;; `match=&#x27;name&#x27;` pairs it",
            "&#x27;x&#x27;; --match name pairs it",
        ),
        ("take `again=True` to move it", "take --again to move it"),
        ("`out_rank` must be", "--out-rank must be"),
        ("`max_memory=2 GiB` is too little", "--max-memory 2 GiB is too little"),
        ("made by `transfer_many()`", "made by `prolora transfer`"),
        ("`auto` and `no_such`", "`auto` and `no_such`"),
    ],
)
def test_the_command_line_names_flags(message, flag):
    assert name_options(message, write_flag) == flag


def test_an_error_names_what_each_reader_has(tmp_path, words):
    lora, source, _ = write_case(tmp_path)
    with pytest.raises(prolora.errors.WrongBase) as caught:
        prolora.transfer(lora, source, source)
    python, flags = str(caught.value), name_options(str(caught.value), write_flag)
    node = words.explain(caught.value)
    assert "take `again=True` to move it" in python and "take --again to move it" in flags
    assert node.rstrip(".").endswith("where the LoRA works as it is")
    assert "--" not in python + node


def test_one_path_stands_for_a_list_of_loras(tmp_path):
    lora, source, target = write_case(tmp_path)
    bases = {"source": source, "target": target}
    (moved,) = prolora.transfer_many(loras=str(lora), **bases, folder=tmp_path / "many")
    assert moved.out.exists() and moved.lora == lora
    with pytest.raises(prolora.errors.InvalidOption, match="takes two LoRAs or more"):
        prolora.merge(lora)


def test_a_node_names_widgets(words):
    fits = "It fits; give it as `source` or `target`"
    for message, said in (
        (fits, "It fits; give it as “trained on” or “use on”"),
        ("Nothing written; `method='copy'` does it", "Nothing written; “method”: copy does it"),
        ("Too little; `max_memory` is too low", "Too little"),
    ):
        assert said in words.explain(prolora.ProLoRAError(message))


def test_a_file_for_several_models_says_how_each_command_takes_the_base():
    with pytest.raises(prolora.errors.UnsupportedFormat) as refused:
        programs.choose_format(("bria-fibo", "cogview4"), "comfyui")
    said = name_options(str(refused.value), write_flag)
    assert "`prolora convert` takes it as an argument after the LoRA" in said
    assert said.endswith("`prolora merge` as --target")
