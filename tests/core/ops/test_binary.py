"""What is inside the compiled module: architectures, registers, libraries, names of arguments."""

import ast
import hashlib
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from prolora.core.ops import (
    krylov_block,
    native,
    precise_product,
    probe,
    small_svd,
    subspace_overlap,
)
from prolora.core.svd.smaller_side import find_side

_C = native.EXTENSION.kernels
if _C is None:
    pytest.skip(f"no compiled extension: {native.EXTENSION.why}", allow_module_level=True)

MODULE = Path(_C.__file__)
ARCHITECTURES = {"sm_75", "sm_80", "sm_90", "sm_100", "sm_120"}
PTX = {"sm_80", "sm_120"}
# (threads in a block, least number of blocks) x registers must fit in 65,536.
REGISTERS = {
    "small_svd_kernel": 128,
    "cancelled_kernel": 64,
    "sum_parts_kernel": 64,
    "panel_qr_kernel": 168,
    "sum_thin_parts_kernel": 64,
    "finish_block_kernel": 168,
    "split_rows_kernel": 128,
    "precise_product_kernel": 255,
}
TILE_KERNELS = (
    "subspace_overlap_kernel",
    "coefficients_kernel",
    "apply_kernel",
    "thin_product_kernel",
)
TILE_REGISTERS = {
    "CudaTileIfLi64": 128,
    "CudaTileIfLi32": 168,
    "TensorTileILi64": 168,
    "TensorTileILi32": 128,
}


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def cuobjdump():
    if not _C.cuda_architectures:
        pytest.skip("this build has no CUDA kernels")
    tool = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec and not tool else []:
        wheel = Path(root) / "cu13/bin/cuobjdump"
        tool = str(wheel) if wheel.exists() else tool
    if not tool:
        pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump")
    return lambda *options: run(tool, *options, str(MODULE))


def test_every_architecture_has_machine_code(cuobjdump):
    listing = cuobjdump("--list-elf", "--list-ptx")
    cubins = set(re.findall(r"(sm_\d+)\.cubin", listing))
    if len(cubins) < len(ARCHITECTURES):
        pytest.skip(f"built for {', '.join(sorted(cubins))} only")
    assert cubins == ARCHITECTURES
    assert set(re.findall(r"(sm_\d+)\.ptx", listing)) == PTX
    told = {f"sm_{number}" for number in re.findall(r"\d+", _C.cuda_architectures)}
    assert told == ARCHITECTURES


def test_no_kernel_spills_or_uses_more_registers_than_its_budget(cuobjdump):
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", cuobjdump("-res-usage")
    )
    names = " ".join(name for name, *_ in usage)
    for kernel in (*TILE_KERNELS, *REGISTERS):
        assert kernel in names
    for name, registers, stack, local in usage:
        budget = next((n for kernel, n in REGISTERS.items() if kernel in name), None)
        if budget is None:
            budget = next(n for tile, n in TILE_REGISTERS.items() if tile in name)
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= budget, name


def test_module_needs_neither_torch_nor_a_driver():
    if not shutil.which("readelf"):
        pytest.skip("no readelf")
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", str(MODULE)))
    assert needed
    for library in needed:
        assert not re.match(r"lib(torch|c10|cuda|cudart|cublas|cusolver|nv)", library), library


def test_stub_names_every_function_and_argument():
    # pybind11 functions have no inspectable signature; the first line of their docstring does.
    stub = ast.parse((Path(__file__).parents[3] / "python/prolora/core/_C.pyi").read_text())
    written = {
        node.name: [a.arg for a in node.args.args]
        for node in stub.body
        if isinstance(node, ast.FunctionDef)
    }
    attributes = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    compiled = {}
    for key, value in vars(_C).items():
        if callable(value) and not key.startswith("_"):
            signature = value.__doc__.splitlines()[0]
            compiled[key] = re.findall(r"(\w+): ", signature)
    assert written == compiled
    assert attributes == {k for k, v in vars(_C).items() if not callable(v) and k[0] != "_"}


def test_sizes_that_python_repeats_are_those_of_the_kernels():
    assert _C.overlap_block == subspace_overlap.BLOCK
    assert _C.max_krylov_width == krylov_block.MAX_WIDTH
    assert _C.max_precise_depth == precise_product.MAX_DEPTH
    assert _C.max_svd_columns == small_svd.MAX_SVD_COLUMNS


OPS_H = Path(__file__).parents[3] / "csrc" / "ops.h"


def test_the_extension_is_built_from_the_interface_that_python_knows():
    text = OPS_H.read_bytes().replace(b"\r", b"")
    assert native.INTERFACE == _C.interface == hashlib.sha256(text).hexdigest()[:12]


def test_python_gives_every_op_the_fields_of_its_struct_in_their_order(monkeypatch):
    text = OPS_H.read_text()
    rows = re.findall(r"OP\((\w+), (\w+), \w+, (\w+)\)", text)
    listed = {op: struct for op, struct, _ in rows}
    assert native.OPS.keys() == {op for op, _, cuda in rows if cuda != "NONE"}
    given, run = {}, native.run_kernel

    def note(kernels, op, cuda, float64, tensors, sizes):
        given[op] = [*tensors, *sizes]
        run(kernels, op, cuda, float64, tensors, sizes)

    monkeypatch.setattr(native, "run_kernel", note)
    for op in probe.CASES:
        probe.run_op(op, "cpu")
    for d in (3, 200):  # in one call, and by the ops one by one
        assert find_side(torch.eye(d, dtype=torch.float64)[None], d - 1).number == [1]
    for op, struct in listed.items():
        body = re.search(rf"struct {struct} {{(.*?)\n}};", text, re.S)[1]
        lines = [line.partition("//")[0] for line in body.splitlines()]
        names = [re.findall(r"(\w+)\s*[,;]", line) for line in lines]
        assert given[op] == [name for some in names for name in some], op


def test_csrc_readme_has_a_row_for_every_op():
    listed = re.findall(r"OP\((\w+), ", OPS_H.read_text())
    rows = re.findall(r"^\| `(\w+)` \|", (OPS_H.parent / "README.md").read_text(), re.M)
    assert sorted(rows) == sorted(listed)
