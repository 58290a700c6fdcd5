"""ONNX files: the weights that are read by name, and what is refused."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from prolora import UnsupportedFormat, inspect, open_base
from prolora.files.onnx_file import OnnxFile

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

CONVOLUTION = "model.input_blocks.1.0.in_layers.2.weight"
LINEAR = "model.time_embed.0.weight"
STORED_IN_OUT = "model.time_embed.2.weight"


def values(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


STORED = {
    CONVOLUTION: values(4, 2, 3, 3),
    LINEAR: values(6, 4),
    "model.time_embed.0.bias": values(6),
    STORED_IN_OUT: values(6, 5),
    "onnx::Mul_12": values(4, 1, 1),
}
NODES = [
    helper.make_node("Gemm", ["a", LINEAR, "model.time_embed.0.bias"], ["b"], transB=1),
    helper.make_node("MatMul", ["b", STORED_IN_OUT], ["c"]),
    helper.make_node("Conv", ["x", CONVOLUTION], ["y"]),
    helper.make_node("Mul", ["y", "onnx::Mul_12"], ["z"]),
]


def write(path, stored=STORED, nodes=NODES, **changes):
    """A file by the package's own writer."""
    initializers = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    for one in initializers:
        for field, value in changes.items():
            setattr(one, field, value)
    graph = helper.make_graph(nodes, "g", [], [], initializers)
    onnx.save(helper.make_model(graph), path)
    return path


def test_weights_are_read_by_name_and_as_torch_stores_them(tmp_path):
    """What a product takes as [in, out] is turned; a folded norm is no weight of a module."""
    path = write(tmp_path / "model.onnx")
    base = open_base(path)
    assert base.shapes == {
        "input_blocks.1.0.in_layers.2": (4, 2, 3, 3),
        "time_embed.0": (6, 4),
        "time_embed.2": (5, 6),
    }
    assert np.array_equal(base.read("time_embed.0"), STORED[LINEAR])
    assert np.array_equal(base.read("time_embed.2"), STORED[STORED_IN_OUT].T)
    file = OnnxFile(path)
    assert np.array_equal(file.read_rows(STORED_IN_OUT, 1, 3), STORED[STORED_IN_OUT].T[1:3])
    assert base.weights["time_embed.0"].origin is not None
    described = inspect(path)
    assert described.kind == "base" and described.format == "onnx"


@pytest.mark.parametrize(
    ("code", "dtype"),
    [
        (TensorProto.FLOAT, torch.float32),
        (TensorProto.FLOAT16, torch.float16),
        (TensorProto.BFLOAT16, torch.bfloat16),
        (TensorProto.DOUBLE, torch.float64),
    ],
)
@pytest.mark.parametrize("raw", [True, False])
def test_numbers_in_bytes_and_in_lists_are_read_in_their_own_type(code, dtype, raw, tmp_path):
    numbers = [0.5, -1.0, 2.0, 3.5, 0.25, -8.0]
    wanted = torch.tensor(numbers, dtype=dtype).reshape(3, 2)
    if raw:
        content = wanted.view(torch.uint8).numpy().tobytes()
        stored = helper.make_tensor("net.a.weight", code, (3, 2), content, raw=True)
    else:
        stored = helper.make_tensor("net.a.weight", code, (3, 2), numbers)
    graph = helper.make_graph([], "g", [], [], [stored])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    read = OnnxFile(tmp_path / "model.onnx").read("net.a.weight")
    assert read.dtype == dtype and torch.equal(read, wanted)


def test_an_exported_module_reads_as_its_own_state_dict(tmp_path):
    """By torch's exporter, which needs no other package in this form."""
    module = torch.nn.Sequential()
    module.time_embed = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU())
    module.input_blocks = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    torch.onnx.export(module, (torch.ones(3, 4),), tmp_path / "model.onnx", dynamo=False)
    read = open_base(tmp_path / "model.onnx")
    wanted = open_base(module)
    assert read.shapes == wanted.shapes
    assert all(torch.equal(read.read(name), wanted.read(name)) for name in wanted.shapes)


def test_a_layer_whose_weight_lost_its_name_is_refused(tmp_path):
    """As the exporter leaves linear layers on features of three axes."""
    nodes = [helper.make_node("MatMul", ["a", "onnx::MatMul_7"], ["b"], name="/blocks.0/fc/MatMul")]
    path = write(tmp_path / "m.onnx", STORED | {"onnx::MatMul_7": values(4, 4)}, [*NODES, *nodes])
    with pytest.raises(UnsupportedFormat, match=r"/blocks\.0/fc/MatMul has lost its name"):
        open_base(path)


@pytest.mark.parametrize("kind", ["DequantizeLinear", "ConvInteger"])
def test_quantised_weights_are_refused(kind, tmp_path):
    path = write(tmp_path / "m.onnx", nodes=[*NODES, helper.make_node(kind, ["a"], ["q"])])
    with pytest.raises(UnsupportedFormat, match=f"quantised .{kind}"):
        open_base(path)


def test_weights_in_another_file_are_refused(tmp_path):
    path = tmp_path / "m.onnx"
    write(path)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    with pytest.raises(UnsupportedFormat, match="lies in another file"):
        open_base(path)


def test_a_weight_used_both_ways_is_refused(tmp_path):
    nodes = [*NODES, helper.make_node("MatMul", ["a", LINEAR], ["d"])]
    with pytest.raises(UnsupportedFormat, match="both as stored and transposed"):
        open_base(write(tmp_path / "m.onnx", nodes=nodes))


def test_sizes_that_contradict_the_bytes_are_refused(tmp_path):
    with pytest.raises(UnsupportedFormat, match="do not fit its shape"):
        open_base(write(tmp_path / "m.onnx", raw_data=b"\0" * 8))


def test_damaged_files_are_refused_by_name(tmp_path):
    path = write(tmp_path / "m.onnx")
    whole = path.read_bytes()
    for content in (b"", b"not a model", whole[:100], whole[: len(whole) - 40]):
        path.write_bytes(content)
        with pytest.raises(UnsupportedFormat, match=r"m\.onnx"):
            open_base(path)


def test_damaged_bytes_never_escape_as_another_error(tmp_path):
    path = write(tmp_path / "m.onnx")
    whole = path.read_bytes()
    places = np.random.default_rng(0).integers(len(whole), size=400)
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xD5]) + whole[place + 1 :])
        try:
            file = OnnxFile(path)
        except UnsupportedFormat as error:
            assert "m.onnx" in str(error)
        else:
            for name, info in file.tensors.items():
                assert tuple(file.read(name).shape) == info.shape


def test_without_the_package_the_error_names_the_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnsupportedFormat, match=r"pip install 'prolora\[onnx\]'"):
        open_base(path)
