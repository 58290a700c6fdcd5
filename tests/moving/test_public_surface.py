"""What help() and an editor show of the public functions, and what a wrong option ends in."""

import dataclasses
import inspect
import math
import pydoc
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mini import write_case

import prolora
from prolora import FitOptions, MergeOptions, TransferOptions
from prolora.fleet.batches import MigrationOptions
from prolora.making.convert import ConvertOptions
from prolora.making.extract_options import ExtractOptions

TRANSFERS = [prolora.transfer, prolora.transfer_many]
FITS = [prolora.fit, prolora.fit_many]
FUNCTIONS = [(f, TransferOptions) for f in TRANSFERS] + [(f, FitOptions) for f in FITS]
FUNCTIONS += [(prolora.migrate, MigrationOptions)]
FUNCTIONS += [(prolora.extract, ExtractOptions), (prolora.convert, ConvertOptions)]
FUNCTIONS += [(prolora.merge, MergeOptions)]


@pytest.mark.parametrize(("function", "kind"), FUNCTIONS, ids=lambda f: f.__name__)
def test_help_shows_every_option_with_its_default(function, kind):
    parameters = inspect.signature(function).parameters
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    text = pydoc.plain(pydoc.render_doc(function))
    for field in dataclasses.fields(kind):
        parameter = parameters[field.name]
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default == field.default
        assert parameter.annotation == field.type
        assert f"{field.name}: " in text


def test_type_checkers_read_what_the_options_tell(monkeypatch):
    """The stub is the one that docs/make_stub.py writes."""
    monkeypatch.setattr(sys, "argv", ["make_stub.py", "--check"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(f"{Path(__file__).parents[2]}/docs/make_stub.py", run_name="__main__")


def test_an_option_that_there_is_not_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(prolora.errors.InvalidOption, match="'metod'; did you mean method"):
        prolora.transfer(*write_case(tmp_path), metod="copy")


FUNCTIONS += [(prolora.load_moved_lora, TransferOptions)]


@pytest.mark.parametrize(("function", "kind"), FUNCTIONS, ids=lambda f: f.__name__)
def test_options_of_another_function_are_refused_with_the_right_ones(function, kind):
    """Before anything else is looked at: none of these is a LoRA or a base."""
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    for other in {of for _, of in FUNCTIONS if not issubclass(of, kind)}:
        with pytest.raises(prolora.errors.InvalidOption) as refused:
            function(*[None] * len(needed), options=other())
        told = str(refused.value)
        assert f"{function.__name__}() takes {kind.__name__}, not {other.__name__}" in told
    for wrong in ({"dtype": "float16"}, kind, None):
        with pytest.raises(prolora.errors.InvalidOption, match=f"takes {kind.__name__}"):
            function(*[None] * len(needed), options=wrong)


WRONG = {
    "threshold": (math.nan, -0.1, "0.5"),
    "max_memory": (math.nan, math.inf, "a lot"),
    "strength": (math.nan, 1e160, [1.0]),
    "out_rank": (True, [8], math.nan, 0, 1.0, "half", "0%"),
    "rank": (math.nan, 0, 2.0),
    "method": ("magic",),
    "text_encoder": ("maybe",),
    "format": ("zip",),
    "dtype": ("int8",),
}


@pytest.mark.parametrize("name, value", [(n, x) for n, values in WRONG.items() for x in values])
def test_an_option_that_is_none_is_refused_by_its_name(tmp_path, name, value):
    case = write_case(tmp_path)
    with pytest.raises(prolora.errors.InvalidOption, match=name):
        prolora.transfer(*case, **{name: value})
    with pytest.raises(prolora.errors.InvalidOption, match=name):
        prolora.transfer_many(case[:1], *case[1:], tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def test_numbers_of_numpy_are_options_as_those_of_python_are(tmp_path, aged):
    plain = {"rank": 8, "threshold": 0.25, "strength": 0.5, "out_rank": 4, "max_memory": 1 << 40}
    kinds = np.int64, np.float64, np.float16, np.int64, np.int64
    given = TransferOptions(
        **{n: kind(x) for kind, (n, x) in zip(kinds, plain.items(), strict=True)}
    )
    plain = TransferOptions(**plain)
    assert given == plain and repr(given) == repr(plain)
    given = FitOptions(images=np.int64(3), guidance=np.float32(2), rank=np.int64(4))
    assert repr(given) == repr(FitOptions(images=3, guidance=2.0, rank=4))
    lora, source, target = write_case(tmp_path)
    options = {"method": "prolora", "cache": tmp_path / "cache"}
    for name, number in (("a", np.float64(0.5)), ("b", 0.5)):
        out = tmp_path / name
        prolora.transfer(lora, source, target, out=out, rank=number, threshold=number, **options)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    # One basis for each weight, by whichever number it was asked for.
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 16


def test_memory_and_dtypes_may_be_texts(tmp_path):
    lora, source, target = write_case(tmp_path)
    assert TransferOptions(max_memory="2GiB").memory_limit == 2 << 30
    assert TransferOptions(max_memory=2e9).memory_limit == 2_000_000_000
    with pytest.raises(prolora.errors.TooLittleMemory):
        prolora.transfer(lora, source, target, max_memory="1MB")
    for name, dtype in (("a", "float16"), ("b", torch.float16)):
        prolora.transfer(lora, source, target, out=tmp_path / name, dtype=dtype)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_a_transfer_gives_prints_in_one_line(tmp_path):
    done = prolora.transfer(*write_case(tmp_path))
    assert repr(done.adapter) == "Adapter(8 modules of rank 4, kohya, float32)"
    counts = "8 mapped, 4 skipped, 0 refused"
    assert repr(done.report) == f"TransferReport('copy', source → target: {counts})"
    assert repr(done) == f"Transfer({done.adapter!r}, {done.report!r})"
