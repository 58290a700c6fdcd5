"""Fixtures: the kernels under each of their backends, and the emulator."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# The processes of pytest-xdist share the cores: one thread each, also in those that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import safetensors.torch
import torch

if os.name == "nt":

    def load_file(path: Any, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Copies what it reads: Windows refuses to write into a file that is mapped."""
        with safetensors.safe_open(path, "pt", device) as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}

    def skip(*_: Any, **__: Any) -> None:
        if not sys._getframe(1).f_globals["__name__"].startswith("_pytest"):
            pytest.skip("Windows has no pipes, and links for administrators only")

    safetensors.torch.load_file = load_file
    os.mkfifo = os.symlink = Path.symlink_to = skip

from backends import GuardedMemory, Kernels, load, missing
from hubs import cloud, hub_server  # noqa: F401 (fixtures)
from hypothesis import settings
from property_examples import examples

from prolora.bases import leaves
from prolora.core.ops import native

# No deadline: other load on a machine must not fail a test. Derandomised: CI repeats.
settings.register_profile("prolora", deadline=None, max_examples=examples(80), derandomize=True)
settings.load_profile("prolora")

SCHEDULES = [0, 1, 2]
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_file_in_the_checkout() -> Iterator[None]:
    """What a test writes belongs into tmp_path: a stray file was committed four times."""
    before = set(os.listdir(ROOT))
    yield
    new = set(os.listdir(ROOT)) - before
    # A build or a demo may run at the same time; git ignores both folders.
    assert all(name.startswith(".") or name in ("build", "prolora-demo") for name in new), new


# What is imported and collected is never garbage, and is not looked through.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


# The name of a file, from .ci/run: it gets the tests in which the extension ran an op, one a line.
# The others test the same code without it.
EXTENSION_RAN_IN = os.environ.get("PROLORA_LIST_EXTENSION_TESTS")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not EXTENSION_RAN_IN:
        return (yield)
    kernels, choose, chosen = native.EXTENSION.kernels, native.choose, []

    def choose_and_keep(op: str, device: torch.device) -> native.Choice:
        chosen.append(choose(op, device))
        return chosen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "choose", choose_and_keep)
        done = yield
    if kernels is not None and any(choice.kernels is kernels for choice in chosen):
        with open(EXTENSION_RAN_IN, "a", encoding="utf-8") as file:
            file.write(item.nodeid + "\n")
    return done


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_tests(tmp_path_factory) -> Iterator[None]:
    """No test reads or fills the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def aged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is old enough for its state to name what is in it."""
    monkeypatch.setattr(leaves, "SETTLING_TIME", -(10**18))


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """New tensors hold NaN, so that an output or scratch a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def list_backends() -> list[Any]:
    """All but one of the schedules, other orders of the same accesses, are slow."""
    emulated = [f"emulated-{schedule}" for schedule in SCHEDULES]
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in emulated if name[-1] != "1"]
    return ["torch", "cpu", "emulated-1", *slow, "cuda"]


@pytest.fixture(params=list_backends())
def kernels(request, monkeypatch, nan_memory) -> Iterator[Kernels]:
    backend, _, seed = request.param.partition("-")
    if backend == "torch":
        yield Kernels(None)
        return
    if backend == "emulated":
        monkeypatch.setenv("EMU_SEED", seed)
        module = load(backend, "_emulated")
        with GuardedMemory() as memory:
            yield Kernels(module, cuda=True)
        memory.check()
        return
    if backend == "cuda":
        count, why = native.cuda_status()
        if count == 0:
            missing(backend, why)
        yield Kernels(load(backend, "_C"), "cuda", cuda=True)
        return
    yield Kernels(load(backend, "_C"))


@pytest.fixture(params=SCHEDULES)
def emulator(request, monkeypatch) -> ModuleType:
    monkeypatch.setenv("EMU_SEED", str(request.param))
    return load("emulated", "_emulator_test")
