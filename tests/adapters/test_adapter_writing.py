import json
import math
from dataclasses import replace

import pytest
import torch
from diagonal import pair_up
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import (
    CONV,
    LINEAR,
    adapter_of,
    attached,
    factors,
    kohya_file,
    same_updates,
    save,
    through_diffusers,
    tiny_unet,
)
from safetensors.torch import load_file

from prolora import adapters
from prolora.adapters import Adapter
from prolora.adapters.formats import encoding
from prolora.adapters.keys.codec import SEVERAL, Codec
from prolora.architectures.family import KOHYA
from prolora.architectures.shared_names import unet_names
from prolora.core.lowrank import LowRank
from prolora.errors import NonFiniteWeights, OutputError, ShapeMismatch, UnsupportedFormat

TEXT = {
    f"{encoder}.text_model.encoder.layers.{layer}.{module}": shape
    for encoder in ("text_encoder", "text_encoder_2")
    for layer in (0, 1)
    for module, shape in {
        "self_attn.q_proj": (16, 16),
        # diffusers knows kohya's attention layers of a text encoder only by this one.
        "self_attn.out_proj": (16, 16),
        "mlp.fc1": (24, 16),
    }.items()
}
ALL = {**LINEAR, **CONV, **TEXT}
SDXL = Codec(unet_names(), format="kohya", spelling=KOHYA, encoders=frozenset({SEVERAL}))
MIXED = [2, 4, 3, 2, 2]  # the most common rank is not the largest
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def dense(adapter):
    return {name: update.dense() for name, update in adapter.updates.items()}


@pytest.mark.parametrize("spelling", ["diffusers", "sgm"])
@pytest.mark.parametrize("rank", [4, MIXED], ids=["one rank", "mixed ranks"])
@pytest.mark.parametrize("format", ["kohya", "diffusers", "comfy"])
def test_every_format_reads_back_to_the_same_updates(tmp_path, format, rank, spelling):
    adapter = adapter_of(ALL, rank, format="kohya", spelling=spelling)
    adapters.write_adapter(adapter, tmp_path / "out.safetensors", format=format)
    back = adapters.read_adapter(tmp_path / "out.safetensors")
    same_updates(adapter, dense(back))
    assert back.kernels == adapter.kernels
    assert back.format == format
    assert format != "kohya" or back.spelling == spelling
    assert {name: u.rank for name, u in back.updates.items()} == {
        name: u.rank for name, u in adapter.updates.items()
    }


def stored(adapter, dtype):
    """The adapter as a file of that dtype holds it: rounding is all that may differ."""
    return adapter.with_updates(
        {n: u.to(dtype).to(torch.float32) for n, u in adapter.updates.items()}
    )


@pytest.mark.parametrize("rank", [4, MIXED], ids=["one rank", "mixed ranks"])
@pytest.mark.parametrize(
    ("written", "dtype"),
    pair_up([("kohya", "diffusers"), ("kohya", "sgm"), ("diffusers", "diffusers")], DTYPES),
)
def test_diffusers_attaches_exactly_what_was_written(tmp_path, written, rank, dtype):
    format, spelling = written
    adapter = adapter_of({**LINEAR, **CONV}, rank, spelling=spelling)
    adapters.write_adapter(adapter, tmp_path / "out.safetensors", format=format, dtype=dtype)
    found = through_diffusers(tmp_path / "out.safetensors")
    same_updates(adapters.read_adapter(tmp_path / "out.safetensors"), found)
    same_updates(adapter, found, max(1e-6, 2 * torch.finfo(dtype).eps))
    if rank == 4:  # mixed ranks change one factor before it is rounded
        same_updates(stored(adapter, dtype), found)


@pytest.mark.parametrize(("alpha", "dtype"), pair_up([None, 4.0, 2.0, 8.0], DTYPES))
def test_text_encoders_of_a_kohya_file_are_those_that_diffusers_attaches(tmp_path, alpha, dtype):
    tensors = {}
    for seed, (name, shape) in enumerate({**LINEAR, **TEXT}.items()):
        up, down = factors(shape, 4, seed, dtype)
        stem = SDXL.write(name)
        tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
        if alpha is not None:
            # The same for all: diffusers takes the most common one for attention modules.
            tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=dtype)
    save(tmp_path / "out.safetensors", tensors)
    attach_text_encoders(tmp_path / "out.safetensors", adapters.read_adapter(tensors))


@pytest.mark.parametrize("rank", [4, MIXED], ids=["one rank", "mixed ranks"])
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_attaches_both_text_encoders_exactly(tmp_path, format, rank):
    adapter = adapter_of({**LINEAR, **TEXT}, rank, spelling="sgm")
    adapters.write_adapter(adapter, tmp_path / "out.safetensors", format=format)
    attach_text_encoders(tmp_path / "out.safetensors", adapter)


def attach_text_encoders(path, adapter):
    """Asserts that diffusers attaches the adapter's updates to both text encoders of SDXL."""
    from types import SimpleNamespace

    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    state, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
        str(path),
        unet_config=SimpleNamespace(layers_per_block=2),
        return_lora_metadata=True,
    )
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
    )
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    for prefix, kind in encoders.items():
        encoder = kind(config)
        StableDiffusionXLPipeline.load_lora_into_text_encoder(
            state, network_alphas=alphas, text_encoder=encoder, prefix=prefix, metadata=metadata
        )
        ours = {
            name.partition("encoder.layers.")[2]: update
            for name, update in adapter.updates.items()
            if name.startswith(f"{prefix}.")
        }
        found = {n.partition("encoder.layers.")[2]: d for n, d in attached(encoder).items()}
        same_updates(Adapter(ours), found)


@pytest.mark.parametrize("rank", [4, MIXED], ids=["one rank", "mixed ranks"])
def test_peft_attaches_exactly_what_was_written(tmp_path, rank):
    from peft import PeftModel

    adapter = adapter_of({**LINEAR, **CONV}, rank)
    adapters.write_adapter(adapter, tmp_path / "out", format="peft")
    model = PeftModel.from_pretrained(tiny_unet(), tmp_path / "out")
    same_updates(adapter, attached(model.base_model.model))
    back = adapters.read_adapter(tmp_path / "out")
    same_updates(adapter, dense(back))
    assert back.format == "peft"


def test_a_module_whose_name_ends_another_keeps_its_own_rank(tmp_path):
    shapes = {"proj_out": (4, 6), "single_transformer_blocks.0.proj_out": (5, 7)}
    shapes |= {f"single_transformer_blocks.{i}.proj_mlp": (5, 7) for i in (0, 1)}
    adapter = adapter_of(shapes, [2, 3, 3, 3])
    for format in ("diffusers", "peft"):
        adapters.write_adapter(adapter, tmp_path / format, format=format)
        same_updates(adapter, dense(adapters.read_adapter(tmp_path / format)))
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"^proj_out": 2}


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft", "comfy"])
def test_auto_writes_the_format_the_adapter_came_in(tmp_path, format):
    adapter = adapter_of(LINEAR, format=format)
    adapters.write_adapter(adapter, tmp_path / "out")
    assert adapters.read_adapter(tmp_path / "out").format == format


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (MIXED, 2)])
def test_kohya_alpha_is_the_commonest_rank_as_a_scalar_of_the_same_dtype(tmp_path, rank, alpha):
    adapter = adapter_of(ALL, rank, dtype=torch.float16)
    adapters.write_adapter(adapter, tmp_path / "out.safetensors")
    tensors = load_file(tmp_path / "out.safetensors")
    alphas = {key: tensor for key, tensor in tensors.items() if key.endswith(".alpha")}
    assert len(alphas) == len(ALL)
    assert all(a.shape == () and a == alpha and a.dtype == torch.float16 for a in alphas.values())


def test_an_alpha_that_the_dtype_cannot_hold_is_stored_wider(tmp_path):
    adapter = adapter_of({"conv_in": (300, 300)}, 257, dtype=torch.bfloat16)
    adapters.write_adapter(adapter, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["lora_unet_conv_in.alpha"] == 257


def test_convolutions_are_written_in_the_shape_of_convolutions(tmp_path):
    adapters.write_adapter(adapter_of(CONV), tmp_path / "out.safetensors")
    shapes = {key: tuple(t.shape) for key, t in load_file(tmp_path / "out.safetensors").items()}
    stem = "lora_unet_down_blocks_1_resnets_0_conv1"
    assert shapes[f"{stem}.lora_down.weight"] == (4, 8, 3, 3)
    assert shapes[f"{stem}.lora_up.weight"] == (16, 4, 1, 1)


def test_diffusers_files_have_no_alpha_and_no_configuration_unless_ranks_differ(tmp_path):
    adapters.write_adapter(adapter_of(ALL), tmp_path / "one", format="diffusers")
    assert not any(key.endswith("alpha") for key in load_file(tmp_path / "one"))
    assert "lora_adapter_metadata" not in adapters.read_adapter(tmp_path / "one").metadata
    adapters.write_adapter(adapter_of(ALL, MIXED), tmp_path / "mixed", format="diffusers")
    table = json.loads(adapters.read_adapter(tmp_path / "mixed").metadata["lora_adapter_metadata"])
    assert {key.split(".")[0] for key in table} == {"unet", "text_encoder", "text_encoder_2"}


@pytest.mark.parametrize(
    ("shapes", "spelling", "prefix"),
    [
        ({"text_encoder.text_model.encoder.layers.0.mlp.fc1": (6, 5)}, "diffusers", "lora_te_"),
        ({"text_encoder.text_model.encoder.layers.0.mlp.fc1": (6, 5)}, "sgm", "lora_te1_"),
        (TEXT, "diffusers", "lora_te1_"),
    ],
)
def test_text_encoders_are_numbered_where_there_are_two(tmp_path, shapes, spelling, prefix):
    adapters.write_adapter(adapter_of(shapes, spelling=spelling), tmp_path / "out")
    assert any(key.startswith(prefix) for key in load_file(tmp_path / "out"))


@pytest.mark.parametrize(
    ("block", "stem"),
    [
        ("up_blocks.2", "lora_unet_output_blocks_6_0_in_layers_2"),
        ("up_blocks.3", "lora_unet_up_blocks_3_resnets_0_conv1"),
    ],
)
def test_sgm_stays_sgm_but_for_the_four_blocks_of_sd1(tmp_path, block, stem):
    shapes = {f"{block}.resnets.0.conv1": (6, 5, 3, 3)}
    adapters.write_adapter(adapter_of(shapes, spelling="sgm"), tmp_path / "out")
    assert f"{stem}.alpha" in load_file(tmp_path / "out")


def test_comfy_calls_the_text_encoder_of_sd2_by_its_own_name(tmp_path):
    shapes = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (1024, 1024)}
    adapters.write_adapter(adapter_of(shapes, 1), tmp_path / "out", format="comfy")
    assert all(
        key.startswith("text_encoders.clip_h.transformer.text_model.")
        for key in load_file(tmp_path / "out")
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_are_stored_in_the_dtype_asked_for(tmp_path, dtype):
    adapter = adapter_of(LINEAR)
    adapters.write_adapter(adapter, tmp_path / "out", dtype=dtype)
    assert {t.dtype for t in load_file(tmp_path / "out").values()} == {dtype}
    same_updates(
        adapter, dense(adapters.read_adapter(tmp_path / "out")), 4 * torch.finfo(dtype).eps
    )


def test_float8_is_written_as_float16(tmp_path):
    adapters.write_adapter(adapter_of(LINEAR, dtype=torch.float8_e4m3fn), tmp_path / "out")
    assert adapters.read_adapter(tmp_path / "out").dtype == torch.float16
    with pytest.raises(UnsupportedFormat, match="not written as"):
        adapters.write_adapter(adapter_of(LINEAR), tmp_path / "out", dtype=torch.float8_e4m3fn)


def scaled(up, down):
    """One module whose factors have the given sizes."""
    adapter = adapter_of({"conv_in": (6, 5)})
    update = adapter.updates["conv_in"]
    return adapter.with_updates({"conv_in": LowRank(update.up * up, update.down * down)})


@pytest.mark.parametrize(("up", "down"), [(1e6, 1e-3), (1e-9, 1e3), (1e-6, 1.0), (0.0, 1.0)])
def test_unbalanced_factors_are_balanced_where_float16_cannot_hold_them(tmp_path, up, down):
    adapter = scaled(up, down)
    adapters.write_adapter(adapter, tmp_path / "out", dtype=torch.float16)
    found = adapters.read_adapter(tmp_path / "out").updates["conv_in"].dense()
    wanted = adapter.updates["conv_in"].dense()
    assert (found - wanted).norm() <= 4e-3 * wanted.norm()


def test_an_overflow_names_the_module_and_the_way_out(tmp_path):
    with pytest.raises(NonFiniteWeights, match=r"conv_in: .*dtype='float32'"):
        adapters.write_adapter(scaled(1e6, 1e6), tmp_path / "out", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    adapters.write_adapter(scaled(1e6, 1e6), tmp_path / "out", dtype=torch.float32)


def test_an_underflow_names_the_module_and_the_way_out(tmp_path):
    with pytest.raises(OutputError, match=r"conv_in: .*too small.*dtype='float32'"):
        adapters.write_adapter(scaled(1e-9, 1e-9), tmp_path / "out", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_not_written(tmp_path, value):
    with pytest.raises(NonFiniteWeights, match="conv_in"):
        adapters.write_adapter(scaled(value, 1.0), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tensors: dict(list(tensors.items())[3:]), "with other modules than written: no "),
        (lambda tensors: {k: x * 2 if not x.dim() else x for k, x in tensors.items()}, "scale"),
        (lambda tensors: tensors | kohya_tensors("conv_out"), "conv_out was not written"),
    ],
    ids=["missing", "scale", "foreign"],
)
def test_an_output_that_fails_leaves_the_old_file_as_it_was(tmp_path, monkeypatch, spoil, said):
    path = kohya_file(tmp_path / "out.safetensors")
    before, encode = path.read_bytes(), encoding.encode_adapter
    monkeypatch.setattr(encoding, "encode_adapter", lambda *given: spoil(encode(*given)))
    with pytest.raises(OutputError, match=said):
        adapters.write_adapter(adapter_of(LINEAR), path, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def kohya_tensors(stem):
    names = [f"lora_unet_{stem}.lora_{end}.weight" for end in ("up", "down")]
    return {name: torch.ones(2, 2) for name in names}


def test_an_adapter_without_modules_is_not_written(tmp_path):
    with pytest.raises(OutputError, match="no module is left"):
        adapters.write_adapter(adapter_of({}), tmp_path / "out")


@pytest.mark.parametrize(
    ("shapes", "format", "message"),
    [
        ({"transformer_blocks.0.attn.to_q": (6, 5)}, "comfy", "different names in the comfy"),
        ({"text_encoder_3.encoder.x": (6, 5)}, "kohya", "no name in the kohya format"),
        (ALL, "peft", "a PEFT folder holds one model"),
        ({"text_encoder_2.text_model.encoder.layers.0.mlp.fc1": (6, 5)}, "peft", "one model"),
        (LINEAR, "onnx", "unknown format 'onnx'"),
    ],
)
def test_a_format_that_cannot_hold_the_adapter_is_refused(tmp_path, shapes, format, message):
    with pytest.raises(UnsupportedFormat, match=message):
        adapters.write_adapter(adapter_of(shapes), tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


def test_an_update_that_does_not_fit_its_kernel_is_refused(tmp_path):
    adapter = replace(adapter_of({"conv_in": (6, 5)}), kernels={"conv_in": (3, 3)})
    with pytest.raises(ShapeMismatch, match="does not fit a kernel"):
        adapters.write_adapter(adapter, tmp_path / "out")


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(ALL)), st.integers(1, 6), min_size=1),
    st.sampled_from(["kohya", "diffusers", "comfy"]),
    st.sampled_from(["diffusers", "sgm"]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_any_adapter_survives_any_format(tmp_path_factory, ranks, format, spelling, dtype):
    path = tmp_path_factory.mktemp("out") / "out.safetensors"
    shapes = {name: ALL[name] for name in ranks}
    adapter = adapter_of(shapes, list(ranks.values()), spelling=spelling)
    adapters.write_adapter(adapter, path, format=format, dtype=dtype)
    same_updates(adapter, dense(adapters.read_adapter(path)), max(8 * torch.finfo(dtype).eps, 1e-6))


@pytest.mark.parametrize("spelling", ["diffusers", "sgm"])
def test_a_lora_of_sdxl_has_kohyas_own_names_whatever_it_came_in(spelling, tmp_path):
    """A1111 misses embeddings and upsamplers under diffusers' names, silently."""
    shapes = {
        "add_embedding.linear_1": (1280, 2816),
        "up_blocks.0.upsamplers.0.conv": (1280, 1280, 3, 3),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (640, 2048),
    }
    adapter = adapter_of(shapes, format="diffusers", spelling=spelling)
    adapters.write_adapter(adapter, tmp_path / "out", format="kohya")
    keys = load_file(tmp_path / "out")
    assert {key.partition(".")[0] for key in keys} == {
        "lora_unet_label_emb_0_0",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
    }


def test_transformers_that_are_not_flux_keep_diffusers_names_in_comfyui(tmp_path):
    """Qwen-Image's attention has FLUX's names, but more blocks; no loader maps FLUX's own on it."""
    shapes = {
        f"transformer_blocks.{block}.attn.{name}": (3072, 3072)
        for block in (0, 59)
        for name in ("to_q", "to_k", "add_q_proj", "to_out.0")
    }
    adapter = adapter_of(shapes, rank=2)
    path = tmp_path / "out.safetensors"
    adapters.write_adapter(adapter, path, format="comfy")
    assert load_file(path).keys() == {
        f"diffusion_model.{name}.lora_{side}.weight" for name in shapes for side in "AB"
    }
    back = adapters.read_adapter(path)
    adapters.write_adapter(back, tmp_path / "again.safetensors")
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(path).keys()
    same_updates(back, {n: u.dense() for n, u in adapter.updates.items()})
