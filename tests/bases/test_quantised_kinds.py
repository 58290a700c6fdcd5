"""Layers as the libraries store them are the weights that the same libraries make of them.

`quantised_layers.safetensors` holds both; `tests/support/make_quantised.py` wrote it.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mini import write_case
from property_examples import examples

from prolora import ProLoRAError, check, open_base
from prolora.bases.quantised import weight as quantised_weight
from prolora.errors import UnsupportedFormat
from prolora.files.safetensors_file import SafetensorsFile
from prolora.files.safetensors_writing import write_safetensors

PLACE = Path(__file__).with_name("quantised_layers.safetensors")
STORED = SafetensorsFile(PLACE)
KINDS = sorted({key.partition("|")[0] for key in STORED.tensors})
Q = "transformer_blocks.0.attn.to_q"
# A product of two float32 is rounded once here and maybe twice, or in another order, there.
SLACK = {
    "bitsandbytes int8": 1e-7,
    "comfy int8, rotated": 1e-6,
    "comfy int4, rotated": 1e-6,
}


def layer(kind):
    """(parts, metadata, the weight as the library reads it)."""
    parts = {
        key.partition("|")[2]: STORED.read(key)
        for key in STORED.tensors
        if key.startswith(f"{kind}|")
    }
    return parts, json.loads(STORED.metadata[kind]), parts.pop("meant")


def store(parts, metadata, folder):
    """A checkpoint of one layer."""
    write_safetensors(folder / "x.safetensors", parts, metadata, overwrite=True)
    return folder / "x.safetensors"


def write_layer(kind, folder, **changes):
    parts, metadata, meant = layer(kind)
    return store(parts | changes, metadata, folder), meant


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_what_its_own_library_reads(kind, tmp_path):
    path, meant = write_layer(kind, tmp_path)
    base = open_base(path)
    assert base.shapes == {Q: tuple(meant.shape)} and base.dtypes == {Q: torch.float32}
    assert check(path).quantised
    error = (base.read(Q) - meant).abs().max() / meant.abs().max()
    assert error <= SLACK.get(kind, 0)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(edges=st.tuples(st.integers(0, 32), st.integers(0, 32)), chunk=st.integers(1, 3000))
def test_some_rows_are_those_of_the_whole_however_few_are_decoded_at_a_time(
    kind, edges, chunk, tmp_path_factory
):
    path, _ = write_layer(kind, tmp_path_factory.mktemp("x"))
    weight = open_base(path).weights[Q]
    whole, (start, stop) = weight.read(), sorted(edges)
    before = quantised_weight._CHUNK
    try:
        quantised_weight._CHUNK = chunk
        # Products of matrices are added up in another order for other numbers of rows.
        near = {"rtol": 0, "atol": SLACK.get(kind, 0) * float(whole.abs().max())}
        assert torch.allclose(weight.read_rows(start, stop), whole[start:stop], **near)
        assert torch.allclose(weight.read(), whole, **near)
    finally:
        quantised_weight._CHUNK = before


def change_part(kind, key, part):
    """The part missing (None), cut off where that makes no other layer, and of another type."""
    yield None
    # With one scale fewer rows are a layer, too.
    whole = kind == "comfy int8" and key.endswith(".weight")
    if part.dim() and part.shape[0] > 1 and not whole:
        yield part[: -(-part.shape[0] // 3)].clone()
    yield part.to(torch.int16 if part.dtype != torch.int16 else torch.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_is_missing_cut_off_or_of_another_type_is_refused_by_name(kind, tmp_path):
    """Every part in turn; none of it may pass, or end in anything but a typed error."""
    parts, metadata, _ = layer(kind)
    optional = ("bias", "weight_format", "input_scale", "output_scale", "zero_point")
    for key, part in parts.items():
        for changed in change_part(kind, key, part) if not key.endswith(optional) else ():
            others = {k: x for k, x in parts.items() if k != key}
            path = store(others | ({} if changed is None else {key: changed}), metadata, tmp_path)
            with pytest.raises(UnsupportedFormat) as refused:
                open_base(path)
            assert Q in str(refused.value), key


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_that_is_not_finite_is_refused_when_the_weight_is_read(kind, tmp_path):
    parts, metadata, _ = layer(kind)
    scales = [key for key, part in parts.items() if part.dtype.is_floating_point]
    scales = [k for k in scales if "scale" in k.rpartition(".")[2] or "absmax" in k or "SCB" in k]
    scales = [key for key in scales if not key.endswith(("input_scale", "output_scale"))]
    assert scales
    for key in scales:
        changed = parts[key].clone()
        changed.view(-1)[0] = float("nan")
        base = open_base(store(parts | {key: changed}, metadata, tmp_path))
        with pytest.raises(UnsupportedFormat, match="not finite") as refused:
            base.read(Q)
        assert key in str(refused.value)


NOTES = {
    "bitsandbytes nf4": f"{Q}.weight.quant_state.bitsandbytes__nf4",
    "comfy int8, rotated": f"{Q}.comfy_quant",
    "comfy AWQ int4": f"{Q}.comfy_quant",
}


@pytest.mark.parametrize("kind", NOTES)
@settings(max_examples=examples(120), deadline=None)
@given(data=st.data())
def test_no_note_ends_in_anything_but_a_weight_or_a_refusal(kind, data, tmp_path_factory):
    parts, metadata, _ = layer(kind)
    key = NOTES[kind]
    note = json.loads(bytes(parts[key].tolist()))
    names = st.sampled_from([*sorted(note), "group_size", "convrot_groupsize", "params", "format"])
    values = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 2**40),
        st.floats(),
        st.sampled_from(["nvfp4", "mxfp8", "nf4", {}]),
        st.lists(st.integers(-1, 2**33), max_size=3),
    )
    note |= data.draw(st.dictionaries(names, values, max_size=3))
    parts[key] = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
    try:
        open_base(store(parts, metadata, tmp_path_factory.mktemp("x"))).read(Q)
    except UnsupportedFormat as error:
        assert Q in str(error)


MUTATIONS = {
    "dropped": lambda part, _: None,
    "cut": lambda part, n: part[: n % (len(part) + 1)] if part.dim() else part,
    "narrowed": lambda part, n: part[..., : n % (part.shape[-1] + 1)] if part.dim() else part,
    "without rows": lambda part, _: part.new_zeros(0, *part.shape[1:]),
    "without columns": lambda part, _: part.new_zeros(*part.shape[:-1], 0),
    "a number": lambda part, _: part.new_zeros(()),
    "one number": lambda part, _: part.flatten()[:1],
    "transposed": lambda part, _: part.mT if part.dim() > 1 else part,
    "flat": lambda part, _: part.flatten(),
    "one axis more": lambda part, _: part[None],
    "twice": lambda part, _: torch.stack([part, part]),
    "of another type": lambda part, n: part.float().to(TYPES[n % len(TYPES)]),
    "zero": lambda part, _: torch.zeros_like(part),
}
TYPES = [*(getattr(torch, f"{u}int{n}") for u in ("", "u") for n in (8, 32, 64)), torch.bool]
TYPES += [torch.float8_e4m3fn, torch.float16, torch.float32, torch.float64]
TYPES += [getattr(torch, "float8_e8m0fnu", torch.float8_e5m2)]  # since torch 2.7


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_part_ends_in_anything_but_a_weight_or_a_refusal_by_name(kind, data, tmp_path_factory):
    parts, metadata, _ = layer(kind)
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(sorted(parts)))
        how = data.draw(st.sampled_from(sorted(MUTATIONS)))
        changed = MUTATIONS[how](parts.pop(key), data.draw(st.integers(0, 400)))
        if changed is not None:
            parts[key] = changed.contiguous().clone()
        if not parts:
            return
    path = store(parts, metadata, tmp_path_factory.mktemp("x"))
    try:
        for weight in open_base(path).weights.values():
            assert weight.read().shape == weight.shape
            assert weight.read_rows(1, weight.shape[0]).shape[1:] == weight.shape[1:]
    except ProLoRAError as error:
        assert Q in str(error) or str(path) in str(error)


@pytest.mark.parametrize("codes", [torch.zeros(()), torch.zeros(0, 4), torch.zeros(4, 0)])
@pytest.mark.parametrize("format", ["int5_of_tomorrow", "asym_w4a8_int8", "float8_e4m3fn", None])
def test_codes_without_rows_are_refused_by_name_whatever_their_note_says(codes, format):
    parts = {f"{Q}.weight": codes.to(torch.float8_e4m3fn if format is None else torch.uint8)}
    parts |= {f"{Q}.weight_scale": torch.ones(()), f"{Q}.weight_s_rel": torch.ones(4, 1)}
    if format:
        note = json.dumps({"format": format}).encode()
        parts[f"{Q}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    with pytest.raises(UnsupportedFormat, match=f"{Q}.weight "):
        open_base(parts)


def test_rows_that_were_added_for_the_matrix_unit_are_no_rows_of_the_weight(tmp_path):
    """Their number follows from the bias, which has none of them."""
    for kind, rows in (("comfy nvfp4", 20), ("comfy mxfp8", 7)):
        path, meant = write_layer(kind, tmp_path, **{f"{Q}.bias": torch.zeros(rows)})
        assert torch.equal(open_base(path).read(Q), meant[:rows])
    nothing = {f"{Q}.weight_scale_2": torch.zeros(()), f"{Q}.bias": torch.zeros(9)}
    base = open_base(write_layer("comfy nvfp4", tmp_path, **nothing)[0])
    assert base.shapes[Q][0] == 32  # 9 rows are padded to 16
    with pytest.raises(UnsupportedFormat, match="zero or not finite"):
        base.read(Q)


@pytest.mark.parametrize("shape", [(64,), (64, 1), (1, 64)])
def test_what_the_inputs_are_scaled_by_belongs_to_the_weight(shape, tmp_path):
    """ComfyUI multiplies the inputs of NVFP4 with it: x·s·Wᵀ is x·(W·s)ᵀ."""
    inputs, x = torch.rand(64) + 0.5, torch.randn(5, 64)
    scale = {f"{Q}.pre_quant_scale": inputs.reshape(shape)}
    path, meant = write_layer("comfy nvfp4", tmp_path, **scale)
    assert torch.allclose(x @ open_base(path).read(Q).mT, (x * inputs) @ meant.mT, atol=1e-6)


def test_the_content_tells_weights_of_other_scales_apart(tmp_path):
    """What is cached of one weight is never taken for another."""
    weight = open_base(write_layer("comfy int8", tmp_path)[0]).weights[Q]
    other = replace(weight, scales=(replace(weight.scales[0], key=weight.stored.key),))
    assert weight.content != other.content and weight.content != weight.stored.content


def test_a_quantised_text_encoder_of_a_pipeline_is_read_by_the_notes_of_its_own_file(tmp_path):
    _, source, _ = write_case(tmp_path)
    there = "text_model.encoder.layers.0.self_attn.q_proj"
    parts, metadata, meant = layer("comfy int8, rotated")
    encoder = source / "text_encoder" / "model.safetensors"
    encoder.parent.mkdir(exist_ok=True)
    write_safetensors(encoder, {k.replace(Q, there): part for k, part in parts.items()}, metadata)
    assert torch.equal(open_base(source).read(f"text_encoder.{there}"), meant)


@pytest.mark.parametrize(
    ("parts", "kind", "way_out"),
    [
        ({"weight._data": torch.int8, "weight._scale": torch.float32}, "quanto", "dequantize()"),
        ({"weight._data._data": torch.uint8, "weight._shift": torch.float32}, "quanto", "fp16"),
        ({"_weight_qdata": torch.int8, "_weight_scale": torch.float32}, "torchao", "dequantize()"),
        ({"qweight": torch.int8, "wscales": torch.bfloat16}, "nunchaku", "bf16 version"),
        ({"qweight": torch.int32, "wzeros": torch.bfloat16}, "nunchaku", "GGUF"),
        ({"qweight": torch.int32, "g_idx": torch.int32}, "not known", "fp16 or bf16"),
    ],
)
def test_what_is_not_read_is_named_with_the_way_out(parts, kind, way_out):
    stored = {f"{Q}.{leaf}": torch.zeros(128, 128, dtype=dtype) for leaf, dtype in parts.items()}
    with pytest.raises(UnsupportedFormat, match=kind) as refused:
        open_base(stored)
    assert Q in str(refused.value) and way_out in str(refused.value)
