"""Where an op runs, and what is said about it."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fresh import run_fresh, try_fresh

import prolora
from prolora.core.ops import native, probe  # noqa: F401, which registers all ops
from prolora.core.ops.native import Choice, kernels_fit

COMPILED = "75-real 80 90-real 100-real 120"


# Capability, what was compiled, whether it runs there: machine code of the same major number, else
# intermediate code (80 of COMPILED for 11.0, 120 for 13.0).
CARDS = [
    *(((7, 0), COMPILED, False), ((7, 5), COMPILED, True), ((8, 9), COMPILED, True)),
    *(((10, 3), COMPILED, True), ((11, 0), COMPILED, True), ((13, 0), COMPILED, True)),
    *(((9, 0), "90a-real", True), ((10, 0), "90a-real", False), ((10, 0), "90a", False)),
    *(((10, 3), "100f-real", True), ((12, 0), "100f", False), ((8, 6), "80-virtual", True)),
    *(((7, 5), "80-virtual", False), ((9, 0), "80-real", False), ((8, 0), "86-real", False)),
    ((9, 0), "", False),
]


@pytest.mark.parametrize(("capability", "architectures", "runs"), CARDS)
def test_a_card_is_usable_if_its_kernels_were_compiled(capability, architectures, runs):
    assert kernels_fit(capability, architectures) is runs


@pytest.fixture
def machine(monkeypatch):
    """A machine with these cards and an extension compiled for `architectures`."""
    caches = (native._cuda_choices, native.serving)

    def play(capabilities, why="", architectures=COMPILED, torch_cuda=True):
        kernels = SimpleNamespace(
            cuda_architectures=architectures,
            cuda_devices=lambda: (capabilities, why),
        )
        monkeypatch.setattr(native, "EXTENSION", Choice(kernels))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_cuda)
        monkeypatch.setattr(torch.version, "hip", None)
        for cache in caches:
            cache.cache_clear()
        return kernels

    yield play
    for cache in caches:
        cache.cache_clear()


def test_only_cards_with_kernels_are_counted(machine):
    kernels = machine([(7, 0), (9, 0)])
    assert native.cuda_status() == (1, "")
    assert native.choose("small_svd", torch.device("cuda:1")).kernels is kernels
    assert native.choose("small_svd", torch.device("cuda:0")).kernels is None


def test_a_card_without_kernels_says_why_and_falls_back_to_torch_once_logged(machine, caplog):
    machine([(7, 0)])
    count, why = native.cuda_status()
    assert count == 0 and "7.0" in why and COMPILED in why
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert native.choose("panel_qr", torch.device("cuda:0")).kernels is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "torch does the work" in record.message and "7.0" in record.message


def test_what_has_no_kernels_is_served_by_torch_and_says_why(machine, monkeypatch):
    card = torch.device("cuda:0")
    machine([], "CUDA driver version is insufficient")
    assert native.cuda_status() == (0, "CUDA driver version is insufficient")
    assert native.choose("small_svd", card) == Choice(None, "CUDA driver version is insufficient")
    machine([(9, 0)], architectures="")
    assert native.cuda_status() == (0, "this build has no CUDA kernels")
    assert native.choose("small_svd", card).kernels is None
    machine([(9, 0)], torch_cuda=False)
    count, why = native.cuda_status()
    assert count == 0 and why.startswith("this torch has no CUDA")
    machine([(9, 0)])
    assert "xpu" in native.choose("small_svd", torch.device("xpu:0")).why
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in native.choose("small_svd", card).why


def test_a_device_that_torch_cannot_use_is_refused_at_once(machine):
    machine([], "no NVIDIA driver is installed", torch_cuda=False)
    native.require_device("cpu")
    for device, words in (
        ("cuda:0", "no usable CUDA device: torch sees none"),
        ("mps", "mps has no float64"),
        ("xpu", "cannot use a device of type xpu"),
    ):
        with pytest.raises(RuntimeError, match=words):
            native.require_device(device)


def test_every_op_is_told_with_what_runs_it(machine):
    machine([], "no device found")
    facts = native.describe_installation()
    assert facts["compiled extension"] == "yes" and facts["CUDA kernels"] == COMPILED
    assert facts["GPUs that run the kernels"] == "0 (no device found)"
    assert facts["op small_svd"] == "cpu: extension; gpu: torch"
    assert facts["op panel_qr"] == "cpu: torch (torch's products are faster on a CPU); gpu: torch"
    machine([(9, 0)])
    facts = native.describe_installation()
    assert facts["GPUs that run the kernels"] == 1
    assert facts["op project_pair"].endswith("gpu: what wins a trial at first use")


LOGS = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
import torch
from prolora.core.ops import native, probe  # noqa: F401, which registers all ops
from prolora.core.ops.small_svd import small_svd
small_svd(torch.ones(3, 4, 2)), small_svd(torch.ones(3, 4, 2).double())
print(native.EXTENSION.kernels)
"""


def test_everything_works_without_the_file_of_the_extension(tmp_path):
    """Factorise, project and compare, in a copy of the package as a pure wheel installs it."""
    package = Path(prolora.__file__).parent
    shutil.copytree(package, tmp_path / "prolora", ignore=shutil.ignore_patterns("*.so", "*.pyd"))
    code = """
sys.meta_path = [x for x in sys.meta_path if "Redirecting" not in type(x).__name__]  # editable
import torch, prolora
from prolora.core.ops import native, probe  # noqa: F401, which registers all ops
assert native.EXTENSION.why == "prolora was installed without it", native.EXTENSION.why
source, target = torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(0))
moved = prolora.project((torch.randn(64, 4), torch.randn(4, 48)), source, target, rank=16)
assert moved.rank <= 8 and 0 <= float(prolora.similarity(source, target, rank=16).left) <= 1
assert native.cuda_status() == (0, f"no compiled extension: {native.EXTENSION.why}")
"""
    run_fresh(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}", PROLORA_NATIVE="AUTO")


# As the system's loader does where a library that the extension needs is not there.
UNLOADABLE = """
class Loader:
    def find_spec(self, name, *_):
        if name == "prolora.core._C":
            raise ImportError("libx.so is missing")
sys.meta_path.insert(0, Loader())
"""


# As an installation without the file, or with that of another version, does.
BROKEN = {
    "built from other sources": "sys.modules['prolora.core._C'] = types.ModuleType('_C')",
    "installed without it": "sys.modules['prolora.core._C'] = None",
    "cannot be loaded: libx.so is missing": f"exec({UNLOADABLE!r})",
}
FAILS = """
os.environ["PROLORA_NATIVE"] = "ON"
try:
    native.load_extension()
except ImportError as error:
    print(error)
"""
NO_PACKAGE = "import sys; sys.modules['prolora.core._C'] = None; import prolora; prolora.transfer"


def test_the_extension_can_be_left_alone_and_one_line_says_so():
    _, printed = try_fresh(LOGS, PROLORA_NATIVE="OFF")
    assert printed.splitlines() == [
        "cpu: torch does the work of the kernels (PROLORA_NATIVE=OFF)",
        "None",
    ]


@pytest.mark.parametrize("why", BROKEN)
def test_an_extension_that_is_missing_or_stale_is_reported_and_can_be_an_error(why):
    program = f"import os, sys, types; {BROKEN[why]}\n{LOGS}{FAILS}"
    logged, _, failed = try_fresh(program, PROLORA_NATIVE="AUTO")[1].partition("\nNone\n")
    assert why in logged
    assert failed.startswith("PROLORA_NATIVE=ON, but there is no compiled extension: ")
    assert why in failed


def test_without_an_extension_that_must_be_there_no_verb_can_be_loaded():
    failed, text = try_fresh(NO_PACKAGE, PROLORA_NATIVE="ON")
    assert failed and "PROLORA_NATIVE=ON, but there is no compiled extension: " in text
