"""What can be refused is refused before a base is hashed or a model is loaded."""

import math
import re
from functools import partial
from importlib import import_module

import pytest
import torch
from mini import shapes
from safetensors.torch import load_file, save_file

import prolora
from prolora import Lora, errors
from prolora.bases import identity
from prolora.bases.leaves import Leaves


@pytest.fixture
def unhashed(monkeypatch):
    """Hashing any byte of a base ends the test."""

    def refuse(*arguments):
        pytest.fail("a base was hashed")

    monkeypatch.setattr(Leaves, "digest", refuse)
    monkeypatch.setattr(identity, "hash_file", refuse)


WEIGHTS = "target/diffusion_pytorch_model.safetensors"
# More than a LoRA has keys: a few would be left out by name.
SURPRISES = {f"surprise{i}.weight": torch.ones(1) for i in range(999)}


NAME = next(iter(shapes(1)))
KEY = "lora_unet_" + NAME.replace(".", "_")
OTHER_MODEL = {
    f"transformer.single_transformer_blocks.0.proj_mlp.lora_{x}.weight": t
    for x, t in (("A", torch.ones(2, 8)), ("B", torch.ones(32, 2)))
}


def change(file, key, number):
    """Writes a number into a tensor of a file."""
    tensors = load_file(file)
    tensors[key][0, 0] = number
    save_file(tensors, file)


FORMAT, SHAPE = errors.UnsupportedFormat, errors.ShapeMismatch


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def add(file, tensors):
    save_file(load_file(file) | tensors, file)


def pickle(file):
    torch.save({"a": SURPRISES}, file, _use_new_zipfile_serialization=False)


# What is wrong -> (which file, how it becomes so, the error, what its message names).
BAD = {
    "no LoRA": (0, lambda x: x.write_bytes(b"nothing"), FORMAT, "lora"),
    "truncated LoRA": (0, cut, FORMAT, "alpha|lora_"),
    "truncated base": (1, cut, FORMAT, "transformer_blocks"),
    "NaN in a base weight": (
        *(1, lambda x: change(x, f"{NAME}.weight", math.nan)),
        *(errors.NonFiniteWeights, re.escape(NAME)),
    ),
    "Inf in the LoRA": (
        *(0, lambda x: change(x, f"{KEY}.lora_up.weight", math.inf)),
        *(errors.NonFiniteWeights, KEY),
    ),
    "LoRA for another architecture": (
        *(0, lambda x: save_file(OTHER_MODEL, x)),
        *(FORMAT, r"single_transformer_blocks\.0\.proj_mlp"),
    ),
    "module whose shape does not fit": (
        *(0, lambda x: add(x, {f"{KEY}.lora_up.weight": torch.ones(25, 4)})),
        *(SHAPE, re.escape(NAME)),
    ),
    "unknown key": (0, lambda x: add(x, SURPRISES), FORMAT, "surprise"),
    "pickle": (0, pickle, FORMAT, "safetensors"),
}


def read_tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def unsolved(monkeypatch):
    """An SVD ends the test."""
    module = import_module("prolora.bases.cache.basis_cache")
    for name in ("truncated_svd", "find_projectors"):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("an SVD ran"))


@pytest.mark.parametrize("which, spoil, error, named", BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name_before_work_and_leaves_no_file(
    case, tmp_path, unhashed, unsolved, which, spoil, error, named
):
    lora, source, target = case
    spoil((lora, next(target.glob("*.safetensors")))[which])
    before = read_tree(tmp_path)
    with pytest.raises(error, match=named):
        prolora.transfer(lora, source, target, out=tmp_path / "out.safetensors")
    assert read_tree(tmp_path) == before
    if which == 0:
        (outcome,) = prolora.transfer_many([lora], source, target, tmp_path / "moved")
        assert outcome.status == "failed" and isinstance(outcome.error, error)


def test_unrelated_or_broken_bases_are_refused_before_one_is_hashed(case, tmp_path, unhashed):
    lora, source, target = case
    file = next(target.glob("*.safetensors"))
    good, out = load_file(file), tmp_path / "out.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({key: torch.randn(x.shape, generator=generator) for key, x in good.items()}, file)
    with pytest.raises(errors.UnrelatedBases):
        prolora.transfer(lora, source, target, out=out)
    good[next(iter(good))][0, 0] = math.nan
    save_file(good, file)
    with pytest.raises(errors.NonFiniteWeights):
        prolora.transfer(lora, source, target, out=out, method="copy")


@pytest.mark.parametrize(
    "options, error, named",
    [
        ({"max_memory": 1 << 20}, errors.TooLittleMemory, "is too little"),
        ({"out": "lora.safetensors/out.safetensors"}, errors.OutputError, "lora.safet.* is a file"),
        ({"out": "source"}, errors.OutputError, "source"),
        ({"out": "lora.safetensors"}, errors.OutputError, "lora.safetensors"),
        ({"out": WEIGHTS}, errors.OutputError, "diffusion_pytorch_model"),
    ],
    ids=["memory", "no folder", "a base's folder", "the LoRA", "a base"],
)
def test_what_has_no_room_is_refused_before_a_base_is_hashed(
    case, tmp_path, unhashed, unsolved, options, error, named
):
    before, out = read_tree(tmp_path), tmp_path / options.get("out", "out.safetensors")
    with pytest.raises(error, match=named):
        prolora.transfer(*case, **options | {"out": out})
    assert read_tree(tmp_path) == before


def test_the_bases_are_hashed_for_a_result(case, tmp_path, unhashed):
    with pytest.raises(pytest.fail.Exception, match="hashed"):
        prolora.transfer(*case, out=tmp_path / "out.safetensors")


@pytest.fixture
def no_weight(monkeypatch):
    monkeypatch.setattr(prolora.Base, "read", lambda *x: pytest.fail("a weight was read"))


def test_where_no_module_has_a_place_dry_run_and_transfer_refuse(case, tmp_path, no_weight):
    lora, source, target = case
    dropped = {key: x for key, x in load_file(lora).items() if "transformer_blocks_2" in key}
    save_file(dropped, lora)
    for run in (partial(prolora.transfer, dry_run=True), prolora.transfer):
        with pytest.raises(errors.ShapeMismatch, match=r"no module .* has a place on the target"):
            run(lora, source, target)
    (outcome,) = prolora.transfer_many([lora], source, target, tmp_path / "out")
    assert isinstance(outcome.error, errors.ShapeMismatch)


@pytest.mark.parametrize("folder", [False, True], ids=["file", "PEFT folder"])
def test_a_file_of_100_gb_of_zeros_is_refused_by_its_header_before_it_is_hashed(
    case, tmp_path, monkeypatch, folder
):
    _, source, target = case
    lora = tmp_path / "zeros"
    weights = lora / "adapter_model.safetensors" if folder else lora.with_suffix(".safetensors")
    weights.parent.mkdir(exist_ok=True)
    with open(weights, "wb") as file:
        file.truncate(100 << 30)
    lora = lora if folder else weights
    fail = property(lambda file: pytest.fail("the LoRA was hashed"))
    monkeypatch.setattr(Lora, "digest", fail)
    with pytest.raises(errors.UnsupportedFormat, match="zeros"):
        prolora.transfer(lora, source, target, out=tmp_path / "moved.safetensors")
    (outcome,) = prolora.transfer_many([lora], source, target, tmp_path / "out")
    assert isinstance(outcome.error, errors.UnsupportedFormat)
