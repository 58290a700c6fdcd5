"""Fixtures: the kernels under each of their backends, and the emulator."""

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from prolora.core.ops import grouped, operators, rows

# No deadline: other load on a machine must not fail a test. Derandomised: CI repeats.
settings.register_profile("prolora", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("prolora")

# PROLORA_REQUIRE=cpu,emulated turns the skip of a listed backend into a failure (for CI).
REQUIRED = os.environ.get("PROLORA_REQUIRE", "").split(",")
SCHEDULES = [0, 1, 2]
INSTRUCTION_SETS = ["baseline", "avx2", "avx512"]


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_tests(tmp_path_factory) -> Iterator[None]:
    """No test reads or fills the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@dataclass
class Kernels:
    """One backend; takes and gives CPU tensors whatever it runs on."""

    module: ModuleType
    device: str
    cuda: bool

    def split_project(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = operators.run_split_project(self.module, *self._there(u, x), self.cuda)
        return tuple(t.cpu() for t in outputs)

    def overlap(self, us: Tensor, ut: Tensor) -> Tensor:
        return operators.run_overlap(self.module, *self._there(us, ut), self.cuda).cpu()

    def overlap_table(self, us: Sequence[Tensor], ut: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        there = self._there(*us), self._there(*ut)
        outputs = grouped.run_overlap_table(self.module, *there, self.cuda)
        return tuple(t.cpu() for t in outputs)

    def project_pair(self, us: Tensor, ut: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = rows.run_project_pair(self.module, *self._there(us, ut, x), self.cuda)
        return tuple(t.cpu() for t in outputs)

    def panel_qr(self, panel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = rows.run_panel_qr(self.module, *self._there(panel), self.cuda)
        return tuple(t.cpu() for t in outputs)

    def small_svd(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = operators.run_small_svd(self.module, *self._there(a), self.cuda)
        return tuple(t.cpu() for t in outputs)

    def _there(self, *tensors: Tensor) -> list[Tensor]:
        return [x.to(self.device) for x in tensors]


def missing(backend: str, reason: object) -> None:
    (pytest.fail if backend in REQUIRED else pytest.skip)(f"{backend}: {reason}")


def load(backend: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(f"prolora.core.{name}")
    except ImportError as error:
        missing(backend, error)
        raise


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """New tensors hold NaN, so that an output or scratch a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(
    params=[
        *(f"cpu-{isa}" for isa in INSTRUCTION_SETS),
        *(f"emulated-{s}" for s in SCHEDULES),
        "cuda",
    ]
)
def kernels(request, monkeypatch, nan_memory) -> Kernels:
    backend, _, variant = request.param.partition("-")
    if backend == "emulated":
        monkeypatch.setenv("EMU_SEED", variant)
        return Kernels(load(backend, "_emulated"), "cpu", cuda=True)
    if backend == "cuda":
        count, why = operators.cuda_status()
        if count == 0:
            missing(backend, why)
        return Kernels(load(backend, "_C"), "cuda", cuda=True)
    module = load(backend, "_C")
    monkeypatch.setenv("PROLORA_ISA", variant)
    if module.cpu_isa() != variant:
        pytest.skip(f"cpu: this processor or build has no {variant}")
    return Kernels(module, "cpu", cuda=False)


@pytest.fixture(params=SCHEDULES)
def emulator(request, monkeypatch) -> ModuleType:
    monkeypatch.setenv("EMU_SEED", str(request.param))
    return load("emulated", "_emulator_test")
