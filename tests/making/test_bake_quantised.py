"""Quantised bases take LoRAs in as their own libraries would store the sum; memory as files do."""

from __future__ import annotations

import json
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from lora_files import read_header
from safetensors.torch import load_file, save_file
from torch import Tensor

import prolora
from prolora.bases.quantised import encoding
from prolora.errors import InvalidOption, UnsupportedFormat

ROWS, COLUMNS = 192, 256  # two tiles of scales high, four wide
MODULE, KEPT = (f"transformer_blocks.0.attn.to_{leaf}" for leaf in "qk")
KITCHEN = {
    "nvfp4": ("TensorCoreNVFP4Layout", {"format": "nvfp4"}, {}),
    "mxfp8": ("TensorCoreMXFP8Layout", {"format": "mxfp8"}, {}),
    "int8": ("TensorWiseINT8Layout", {"format": "int8_tensorwise"}, {}),
    "int8 by row": ("TensorWiseINT8Layout", {"format": "int8_tensorwise"}, {"per_channel": True}),
    "int8, rotated": (
        "TensorWiseINT8Layout",
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16},
        {"per_channel": True, "convrot": True, "convrot_groupsize": 16},
    ),
}


def make_update(norm: float) -> tuple[dict[str, Tensor], Tensor]:
    """A LoRA on one module, and its product."""
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(ROWS, 4, generator=generator)
    down = torch.randn(4, COLUMNS, generator=generator)
    up *= norm / (up @ down).norm()
    names = {"lora_A": down, "lora_B": up}
    return {f"transformer.{MODULE}.{name}.weight": x for name, x in names.items()}, up @ down


def make_weight() -> Tensor:
    return 0.05 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def measure_share(before: Tensor, after: Tensor, delta: Tensor) -> float:
    """⟨Q(W + ΔW) − W, ΔW⟩ / ‖ΔW‖² in float64."""
    change, wanted = after.double() - before.double(), delta.double()
    return float((change * wanted).sum() / wanted.square().sum())


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (one, other)))


def write_gguf(path, tensors: dict[str, tuple[np.ndarray, Kind]]) -> None:
    writer = gguf.GGUFWriter(str(path), "flux")
    for name, (rows, kind) in tensors.items():
        writer.add_tensor(name, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", ["Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "BF16"])
def test_a_gguf_file_holds_what_the_gguf_package_makes_of_the_sum(name, tmp_path):
    kind, weight = Kind[name], make_weight()
    rows = gguf.quants.quantize(weight.numpy(), kind)
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    write_gguf(base, {f"{key}.weight": (rows, kind) for key in (MODULE, KEPT)})
    before = torch.from_numpy(gguf.quants.dequantize(rows, kind).astype(np.float32))
    lora, delta = make_update(0.3 * float(weight.norm()))
    report = prolora.bake([lora], base, out)
    stored = read_gguf(out)
    expected = gguf.quants.quantize((before + delta).numpy(), kind)
    assert np.array_equal(stored[f"{MODULE}.weight"].view(np.uint8), expected.view(np.uint8))
    assert np.array_equal(stored[f"{KEPT}.weight"].view(np.uint8), rows.view(np.uint8))
    after = torch.from_numpy(gguf.quants.dequantize(expected, kind).astype(np.float32))
    share = measure_share(before, after, delta)
    assert report.to_dict()["modules"] == {MODULE: pytest.approx(share, rel=1e-5)}
    assert torch.equal(prolora.open_base(out).read(MODULE).float(), after)


def test_a_small_lora_is_said_to_need_more_bits_than_four(tmp_path):
    weight, kind = make_weight(), Kind.Q4_0
    rows = gguf.quants.quantize(weight.numpy(), kind)
    write_gguf(tmp_path / "base.gguf", {f"{MODULE}.weight": (rows, kind)})
    before = torch.from_numpy(gguf.quants.dequantize(rows, kind))
    for norm, bits in ((0.05, 8), (0.004, 16)):
        lora, delta = make_update(norm * float(weight.norm()))
        report = prolora.bake([lora], tmp_path / "base.gguf", tmp_path / f"{bits}.gguf")
        assert report.to_dict()["survived"] < 0.9 and report.to_dict()["bits"] == {MODULE: bits}
        assert f"these need {bits} bits a number: {MODULE}" in str(report.to_dict()["summary"])
        packed = gguf.quants.quantize(before.numpy(), Kind.Q8_0)
        base = torch.from_numpy(gguf.quants.dequantize(packed, Kind.Q8_0))
        packed = gguf.quants.quantize((base + delta).numpy(), Kind.Q8_0)
        after = torch.from_numpy(gguf.quants.dequantize(packed, Kind.Q8_0))
        assert (measure_share(base, after, delta) >= 0.9) == (bits == 8)


def test_a_k_kind_is_refused_with_what_would_survive_at_8_and_16_bits(tmp_path):
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (ROWS, COLUMNS // 256, 144), dtype=np.uint8)
    scales = np.full((ROWS, COLUMNS // 256, 2), 2e-4, dtype=np.float16)
    blocks[..., :4] = scales.view(np.uint8)
    rows = blocks.reshape(ROWS, -1)
    write_gguf(tmp_path / "base.gguf", {f"{MODULE}.weight": (rows, Kind.Q4_K)})
    before = torch.from_numpy(gguf.quants.dequantize(rows, Kind.Q4_K))
    lora, delta = make_update(0.002 * float(before.norm()))
    base = before.bfloat16().float()
    at_16 = measure_share(base, (base + delta).bfloat16().float(), delta)
    packed = gguf.quants.quantize(before.numpy(), Kind.Q8_0)
    base = torch.from_numpy(gguf.quants.dequantize(packed, Kind.Q8_0))
    packed = gguf.quants.quantize((base + delta).numpy(), Kind.Q8_0)
    at_8 = measure_share(base, torch.from_numpy(gguf.quants.dequantize(packed, Kind.Q8_0)), delta)
    assert at_8 < 0.9 and abs(at_16 - at_8) > 0.02
    with pytest.raises(UnsupportedFormat) as refused:
        prolora.bake([lora], tmp_path / "base.gguf", tmp_path / "out.gguf")
    text = str(refused.value)
    assert "GGUF Q4_K" in text and f"{at_8:.0%} of the LoRA would survive in 8 bits" in text
    assert f"{at_16:.0%} in 16" in text and f"need 16 bits: {MODULE}" in text
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="comfy-kitchen is installed on Linux alone")
@pytest.mark.parametrize("kind", list(KITCHEN))
def test_a_layer_of_comfyui_holds_what_comfy_kitchen_makes_of_the_sum(kind, tmp_path):
    from comfy_kitchen.tensor import QuantizedTensor
    from make_quantised import write_note

    layout, note, options = KITCHEN[kind]
    layer = QuantizedTensor.from_float(make_weight(), layout, **options)
    stored = {}
    for module in (MODULE, KEPT):
        stored |= layer.state_dict(f"{module}.weight") | {f"{module}.comfy_quant": write_note(note)}
    stored = {key: x.clone() for key, x in stored.items()}
    save_file(stored, tmp_path / "base.safetensors")
    before = layer.dequantize().float()
    lora, delta = make_update(0.3 * float(before.norm()))
    report = prolora.bake([lora], tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    baked = load_file(tmp_path / "out.safetensors")
    expected = QuantizedTensor.from_float(before + delta, layout, **options)
    fresh = stored | expected.state_dict(f"{MODULE}.weight")
    assert baked.keys() == fresh.keys()
    for key, tensor in baked.items():
        assert tensor.dtype == fresh[key].dtype, key
        assert same_bits(tensor, fresh[key]), key
    share = measure_share(before, expected.dequantize(), delta)
    assert report.to_dict()["modules"] == {MODULE: pytest.approx(share, rel=1e-4)}


@pytest.mark.skipif(sys.platform != "linux", reason="comfy-kitchen is installed on Linux alone")
def test_input_scales_of_nvfp4_are_part_of_the_sum(tmp_path):
    """ComfyUI reads W = codes · scales · pre_quant_scale, so the codes hold (W + ΔW) divided."""
    from comfy_kitchen.tensor import QuantizedTensor
    from make_quantised import write_note

    weight, layout = make_weight(), "TensorCoreNVFP4Layout"
    inputs = torch.linspace(0.1, 4, COLUMNS)
    layer = QuantizedTensor.from_float(weight / inputs, layout)
    stored = {key: x.clone() for key, x in layer.state_dict(f"{MODULE}.weight").items()}
    stored |= {f"{MODULE}.pre_quant_scale": inputs}
    stored |= {f"{MODULE}.comfy_quant": write_note({"format": "nvfp4"})}
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(stored, base)
    before = layer.dequantize().float() * inputs
    lora, delta = make_update(0.3 * float(weight.norm()))
    report = prolora.bake([lora], base, out)
    expected = QuantizedTensor.from_float((before + delta) / inputs, layout)
    baked, fresh = load_file(out), stored | expected.state_dict(f"{MODULE}.weight")
    assert baked.keys() == fresh.keys()
    assert [key for key, x in baked.items() if not same_bits(x, fresh[key])] == []
    after = expected.dequantize() * inputs
    assert (after - before - delta).norm() < 0.1 * (before + delta).norm()
    assert torch.equal(prolora.open_base(out).read(MODULE), after)
    share = measure_share(before, after, delta)
    assert report.to_dict()["modules"] == {MODULE: pytest.approx(share, rel=1e-4)}


def make_int8() -> dict[str, Tensor]:
    """A base of one weight, with a scale for each row."""
    return {
        f"{MODULE}.weight": torch.ones(ROWS, COLUMNS, dtype=torch.int8),
        f"{MODULE}.weight_scale": torch.ones(ROWS, 1),
        f"{MODULE}.comfy_quant": torch.tensor(list(b'{"format": "int8_tensorwise"}')).byte(),
    }


@pytest.mark.parametrize(
    ("raised", "way_out"),
    [
        (ImportError("no module"), "pip install comfy-kitchen"),
        (ValueError("of its types one is unknown"), f"a newer torch than {torch.__version__}"),
    ],
    ids=["missing", "with an old torch"],
)
def test_where_comfy_kitchen_cannot_be_imported_the_error_says_what_to_do(
    raised, way_out, monkeypatch, tmp_path
):
    def fail():
        raise raised

    monkeypatch.setattr(encoding, "_import_kitchen", fail)
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(make_int8(), base)
    lora, delta = make_update(0.5 * ROWS**0.5)
    with pytest.raises(UnsupportedFormat) as refused:
        prolora.bake([lora], base, out)
    assert way_out in str(refused.value) and f"{MODULE}.weight: int8" in str(refused.value)
    assert list(tmp_path.iterdir()) == [base]
    prolora.bake([lora], base, out, dtype="float32")  # which no package writes
    torch.testing.assert_close(load_file(out)[f"{MODULE}.weight"], 1 + delta)


def test_header_of_plain_numbers_has_no_quantisation(tmp_path):
    """With the note a reader would look for scales of numbers that have none."""
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    note = {"layers": {MODULE: {"format": "int8_tensorwise"}}}
    stored = make_int8()
    del stored[f"{MODULE}.comfy_quant"]
    save_file(stored, base, {"_quantization_metadata": json.dumps(note), "title": "x"})
    lora, delta = make_update(0.5 * ROWS**0.5)
    prolora.bake([lora], base, out, dtype="float32")
    assert read_header(out) == {"title": "x"}
    assert load_file(out).keys() == {f"{MODULE}.weight"}
    made = prolora.open_base(out)
    assert not made.quantised_as
    torch.testing.assert_close(made.read(MODULE), 1 + delta)


def test_a_quantised_state_dict_is_refused_by_name_with_the_way_out():
    with pytest.raises(UnsupportedFormat, match=rf"{MODULE}.*in memory .* give its file"):
        prolora.bake([make_update(0.1)[0]], make_int8())


@pytest.mark.skipif(sys.platform != "linux", reason="comfy-kitchen is installed on Linux alone")
def test_what_has_no_rounding_at_random_refuses_it(tmp_path):
    from comfy_kitchen.tensor import QuantizedTensor
    from make_quantised import write_note

    layer = QuantizedTensor.from_float(make_weight(), "TensorCoreNVFP4Layout")
    note = {f"{MODULE}.comfy_quant": write_note({"format": "nvfp4"})}
    save_file(layer.state_dict(f"{MODULE}.weight") | note, tmp_path / "base.safetensors")
    lora, _ = make_update(0.1)
    with pytest.raises(InvalidOption, match="rounded to the nearest"):
        prolora.bake(
            [lora], tmp_path / "base.safetensors", tmp_path / "x.safetensors", stochastic=1
        )
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.half, torch.float8_e4m3fn])
def test_a_state_dict_comes_back_as_the_file_would_have_it(dtype, tmp_path):
    weight = make_weight().to(dtype)
    tensors = {f"{MODULE}.weight": weight, f"{KEPT}.weight": weight.clone(), "x": torch.ones(3)}
    save_file(tensors, tmp_path / "base.safetensors")
    lora, _ = make_update(0.1 * float(weight.float().norm()))
    in_file = prolora.bake([lora], tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    given, before = dict(tensors), weight.clone()
    report = prolora.bake([lora], given)
    assert report.path is None and report.tensors.keys() == tensors.keys()
    for key, tensor in load_file(tmp_path / "out.safetensors").items():
        assert same_bits(tensor, report.tensors[key]), key
    changed = {key for key, x in report.tensors.items() if x.data_ptr() != tensors[key].data_ptr()}
    assert changed == {f"{MODULE}.weight"} and same_bits(given[f"{MODULE}.weight"], before)
    assert report.to_dict()["modules"] == in_file.to_dict()["modules"]


def test_where_the_result_goes_follows_from_the_base(tmp_path):
    tensors = {f"{MODULE}.weight": make_weight()}
    save_file(tensors, tmp_path / "base.safetensors")
    lora, _ = make_update(0.1)
    with pytest.raises(InvalidOption, match=r"report\.tensors"):
        prolora.bake([lora], tensors, tmp_path / "out.safetensors")
    with pytest.raises(InvalidOption, match="`out` is missing"):
        prolora.bake([lora], tmp_path / "base.safetensors")
