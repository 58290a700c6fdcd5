"""GGUF bases: what is read, what is refused, and what a damaged header can do."""

import struct
import sys
import time

import numpy as np
import pytest
import torch
from checkpoints import gguf_header, gguf_string

from prolora import open_base
from prolora.errors import UnsupportedFormat
from prolora.files import gguf_file

gguf = pytest.importorskip("gguf")
from gguf.quants import dequantize, quantize  # noqa: E402

Q = "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
MODULE = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_1"]


def values(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def write(path, tensors, kind="Q8_0", shapes=()):
    """A file by the package's own writer, in one type."""
    writer = gguf.GGUFWriter(str(path), "flux")
    type_ = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        stored = tensor.astype(np.float16) if kind == "F16" else tensor
        if kind not in ("F32", "F16"):
            stored = quantize(tensor, type_)
        writer.add_tensor(name, stored, raw_dtype=type_)
    for name, shape in shapes:
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_reads_as_the_package_dequantises_it(kind, tmp_path):
    """Where numbers are stored as they are, in their own dtype."""
    tensor = values(64, 96)
    base = open_base(write(tmp_path / "mine.gguf", {Q: tensor}, kind))
    assert open_base(tmp_path).shapes == base.shapes  # the only checkpoint of a folder
    assert base.shapes == {MODULE: (64, 96)}
    assert base.name == "mine.gguf" and base.tensor_name(MODULE) == f"mine.gguf:{Q}"
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    read = base.read(MODULE)
    assert read.dtype == base.dtypes[MODULE] == plain.get(kind, torch.float32)
    type_ = gguf.GGMLQuantizationType[kind]
    stored = tensor.astype(np.float16) if kind == "F16" else quantize(tensor, type_)
    wanted = dequantize(stored, type_) if kind != "F32" else tensor
    assert np.array_equal(read.float().numpy(), wanted)
    assert np.linalg.norm(read.float().numpy() - tensor) < 0.1 * np.linalg.norm(tensor)


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_fused_flux_matrices_are_read_by_rows(kind, tmp_path):
    """Only the bytes of these rows are read and dequantised."""
    fused = "double_blocks.0.img_attn.qkv.weight"
    paths = (write(tmp_path / name[:9], {name: values(192, 64)}, kind) for name in (Q, fused))
    whole, base = map(open_base, paths)
    whole = whole.read(MODULE)
    for i, leaf in enumerate("qkv"):
        part = base.read(f"transformer_blocks.0.attn.to_{leaf}")
        assert torch.equal(part, whole[64 * i : 64 * (i + 1)])


def test_a_shape_noted_beside_a_flattened_weight_is_restored(tmp_path):
    """ComfyUI's converters flatten convolutions whose rows a block does not divide."""
    key = "input_blocks.1.0.in_layers.2.weight"
    tensor = values(8, 4, 3, 3)
    flat = {Q: values(32, 32), key: tensor.reshape(9, 32)}
    path = write(tmp_path / "x.gguf", flat, "F16", [(key, tensor.shape)])
    base = open_base(path)
    module = "down_blocks.0.resnets.0.conv1"
    assert base.shapes[module] == (8, 4, 3, 3)
    assert np.array_equal(base.read(module).numpy(), tensor.astype(np.float16))
    rows = base.weights[module].read_rows(2, 5)
    assert np.array_equal(rows.numpy(), tensor[2:5].astype(np.float16))


def test_without_the_package_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    path = write(tmp_path / "x.gguf", {Q: values(32, 32)})
    monkeypatch.setitem(sys.modules, "gguf", None)
    gguf_file.load_gguf.cache_clear()
    with pytest.raises(UnsupportedFormat, match="pip install gguf;"):
        open_base(path)
    gguf_file.load_gguf.cache_clear()


def one(shape=(32, 32), kind=0, offset=0, name=Q):
    return [(name, shape, kind, offset)]


LONG, ALIGN_0 = struct.pack("<Q", 2**60), struct.pack("<II", 4, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF", "ends inside its header"),
        (b"GGUF" + struct.pack("<I", 1), "version 1"),
        (b"GGUF" + struct.pack(">I", 3), "version 50331648"),
        (b"GGUF" + struct.pack("<I", 3) + LONG + LONG, "says that it has 1152921504606846976 ten"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + LONG, "a name of 1152921504606846976 bytes"),
        (gguf_header([], gguf_string("a") + struct.pack("<II", 9, 4) + LONG, 1), "in a list"),
        (gguf_header([], gguf_string("a") + struct.pack("<IIQ", 9, 9, 3), 1), "unknown type 9"),
        (gguf_header([], gguf_string("a") + struct.pack("<I", 77), 1), "unknown type 77"),
        (gguf_header([], struct.pack("<Q", 1) + b"\xff", 1), "not UTF-8"),
        (gguf_header([], gguf_string("general.alignment") + ALIGN_0, 1), "alignment is 0"),
        (gguf_header(one() * 2), "occurs twice"),
        (gguf_header(one(())), "has 0 axes"),
        (gguf_header(one((1,) * 6)), "has 6 axes"),
        (gguf_header(one((2**40, 2**40))), "impossible shape"),
        (gguf_header(one((32, 0))), "impossible shape"),
        (gguf_header(one((32, 33), kind=8)), "impossible shape"),
        (gguf_header(one(kind=99)), "type 99, which the installed gguf cannot"),
        (gguf_header(one(offset=2**63)), "impossible shape"),
        (gguf_header(one()), "cut off"),
        (gguf_header([*one(), (Q + "x", (32, 32), 0, 2048)]) + b"\0" * 8192, "overlaps"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(content, message, tmp_path):
    """Before anything of the size it claims is read or made."""
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(UnsupportedFormat, match=message) as refused:
        open_base(path)
    assert str(path) in str(refused.value)


def test_a_file_changed_while_open_is_noticed(tmp_path):
    base = open_base(write(tmp_path / "x.gguf", {Q: values(32, 32)}))
    write(tmp_path / "x.gguf", {Q: values(64, 64)})
    with pytest.raises(UnsupportedFormat, match="was changed"):
        base.read(MODULE)


def test_a_header_of_empty_texts_is_refused_in_a_moment(tmp_path):
    """Two million of them take 16 MB, and nothing else limits them."""
    path, key = tmp_path / "empty.gguf", b"list"
    texts = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, 1_000_000)
    whole = b"".join(texts.replace(key, b"lis%d" % i) + bytes(8 * 1_000_000) for i in range(2))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + whole)
    started = time.process_time()
    with pytest.raises(UnsupportedFormat, match="more texts than any real one"):
        open_base(path)
    assert time.process_time() - started < 5
