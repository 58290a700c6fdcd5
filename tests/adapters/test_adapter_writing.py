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
    dense,
    kohya_file,
    pair,
    same_updates,
    through_diffusers,
    tiny_unet,
)

import prolora
from prolora import Adapter, LowRank
from prolora.adapters.formats import encoding
from prolora.errors import NonFiniteWeights, OutputError, ShapeMismatch, UnsupportedFormat

TEXT = {
    f"{encoder}.text_model.encoder.layers.{layer}.{module}": shape
    for encoder in ("text_encoder", "text_encoder_2")
    for layer in (0, 1)
    for module, shape in {
        "self_attn.q_proj": (16, 16),
        "self_attn.out_proj": (16, 16),  # by which diffusers knows kohya's attention layers
        "mlp.fc1": (24, 16),
    }.items()
}
ALL = {**LINEAR, **CONV, **TEXT}
MIXED = [2, 4, 3, 2, 2]  # the most common rank is not the largest


def stored(adapter, dtype):
    """The adapter as a file of that dtype holds it: rounding is all that may differ."""
    return adapter.with_updates(
        {n: u.to(dtype).to(torch.float32) for n, u in adapter.updates.items()}
    )


WRITTEN = [
    ("kohya", "diffusers", torch.float16),
    ("kohya", "sgm", torch.float32),
    ("diffusers", "diffusers", torch.bfloat16),
]


@pytest.mark.parametrize(("rank", "written"), pair_up([4, MIXED], WRITTEN))
def test_diffusers_attaches_exactly_what_was_written(tmp_path, written, rank):
    format, spelling, dtype = written
    adapter = adapter_of({**LINEAR, **CONV}, rank, spelling=spelling)
    out = tmp_path / "out.safetensors"
    prolora.convert(adapter, out=out, format=format, dtype=dtype)
    found = through_diffusers(out)
    same_updates(prolora.convert(out).adapter, found)
    same_updates(adapter, found, max(1e-6, 2 * torch.finfo(dtype).eps))
    if rank == 4:  # mixed ranks change one factor before it is rounded
        same_updates(stored(adapter, dtype), found)


@pytest.mark.parametrize(("rank", "format"), pair_up([4, MIXED], ["kohya", "diffusers"]))
def test_diffusers_attaches_both_text_encoders_exactly(tmp_path, format, rank):
    adapter = adapter_of({**LINEAR, **TEXT}, rank, spelling="sgm")
    prolora.convert(adapter, out=tmp_path / "out.safetensors", format=format, dtype="float32")
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
    sizes = {"hidden_size": 16, "intermediate_size": 24, "projection_dim": 8, "vocab_size": 20}
    config = CLIPTextConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
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
    prolora.convert(adapter, out=tmp_path / "out", format="peft", dtype="float32")
    model = PeftModel.from_pretrained(tiny_unet(), tmp_path / "out")
    same_updates(adapter, attached(model.base_model.model))
    back = prolora.convert(tmp_path / "out").adapter
    same_updates(adapter, dense(back))
    assert back.format == "peft"


def test_a_module_whose_name_ends_another_keeps_its_own_rank(tmp_path):
    shapes = {"proj_out": (4, 6), "single_transformer_blocks.0.proj_out": (5, 7)}
    shapes |= {f"single_transformer_blocks.{i}.proj_mlp": (5, 7) for i in (0, 1)}
    adapter = adapter_of(shapes, [2, 3, 3, 3])
    for format, name in (("diffusers", "x.safetensors"), ("peft", "peft")):
        prolora.convert(adapter, out=tmp_path / name, format=format, dtype="float32")
        same_updates(adapter, dense(prolora.convert(tmp_path / name).adapter))
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"^proj_out": 2}


def read_written(adapter, **how):
    """What is written of an adapter, with its metadata, and what is read of that."""
    written = prolora.convert(adapter, **how).state_dict()
    return written, prolora.convert(written).adapter


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (MIXED, 2)])
def test_kohya_alpha_is_the_commonest_rank_as_a_scalar_of_the_same_dtype(rank, alpha):
    adapter = adapter_of(ALL, rank, dtype=torch.float16)
    tensors, _ = read_written(adapter)
    alphas = {key: tensor for key, tensor in tensors.items() if key.endswith(".alpha")}
    assert len(alphas) == len(ALL)
    assert all(a.shape == () and a == alpha and a.dtype == torch.float16 for a in alphas.values())


def test_an_alpha_that_the_dtype_cannot_hold_is_stored_wider():
    adapter = adapter_of({"conv_in": (300, 300)}, 257, dtype=torch.bfloat16)
    assert read_written(adapter)[0]["lora_unet_conv_in.alpha"] == 257


def test_diffusers_files_have_no_alpha_and_no_configuration_unless_ranks_differ(tmp_path):
    for rank, parts in ((4, set()), (MIXED, {"unet", "text_encoder", "text_encoder_2"})):
        out = tmp_path / f"{len(parts)}.safetensors"
        prolora.convert(adapter_of(ALL, rank), out=out, format="diffusers")
        lora = prolora.Lora.open(out)
        assert not any(key.endswith("alpha") for key in lora.tensors)
        table = json.loads(lora.metadata.get("lora_adapter_metadata", "{}"))
        assert {key.split(".")[0] for key in table} == parts


FC1, TE_Q = "text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.self_attn.q_proj"
CLIP_H = {f"text_encoder.{TE_Q}": (1024, 1024)}


@pytest.mark.parametrize(
    ("shapes", "spelling", "format", "prefix"),
    [
        ({f"text_encoder.{FC1}": (6, 5)}, "diffusers", "kohya", "lora_te_"),
        ({f"text_encoder.{FC1}": (6, 5)}, "sgm", "kohya", "lora_te1_"),
        (TEXT, "diffusers", "kohya", "lora_te1_"),
        (CLIP_H, "diffusers", "comfy", "text_encoders.clip_h.transformer.text_model."),  # SD2's
    ],
)
def test_text_encoders_are_numbered_where_there_are_two_and_named_for_comfyui(
    shapes, spelling, format, prefix
):
    keys = read_written(adapter_of(shapes, 1, spelling=spelling), format=format)[0]
    assert any(key.startswith(prefix) for key in keys)


@pytest.mark.parametrize(
    ("block", "stem"),
    [
        ("up_blocks.2", "lora_unet_output_blocks_6_0_in_layers_2"),
        ("up_blocks.3", "lora_unet_up_blocks_3_resnets_0_conv1"),
    ],
)
def test_sgm_stays_sgm_but_for_the_four_blocks_of_sd1(block, stem):
    shapes = {f"{block}.resnets.0.conv1": (6, 5, 3, 3)}
    assert f"{stem}.alpha" in read_written(adapter_of(shapes, spelling="sgm"))[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_are_stored_in_the_dtype_asked_for_and_float8_as_float16(dtype):
    adapter = adapter_of(LINEAR, dtype=torch.float8_e4m3fn)
    tensors, back = read_written(adapter, dtype=dtype)
    assert {t.dtype for t in tensors.values()} == {dtype}
    same_updates(adapter, dense(back), max(4 * torch.finfo(dtype).eps, 1e-6))
    assert read_written(adapter)[1].dtype == torch.float16
    with pytest.raises(prolora.ProLoRAError, match="float8_e4m3fn"):
        prolora.convert(adapter, dtype=torch.float8_e4m3fn).state_dict()


def scaled(up, down):
    """One module whose factors have the given sizes."""
    adapter = adapter_of({"conv_in": (6, 5)})
    update = adapter.updates["conv_in"]
    return adapter.with_updates({"conv_in": LowRank(update.up * up, update.down * down)})


@pytest.mark.parametrize(("up", "down"), [(1e6, 1e-3), (1e-9, 1e3), (1e-6, 1.0), (0.0, 1.0)])
def test_unbalanced_factors_are_balanced_where_float16_cannot_hold_them(up, down):
    adapter = scaled(up, down)
    found = read_written(adapter, dtype="float16")[1].updates["conv_in"].dense()
    wanted = adapter.updates["conv_in"].dense()
    assert (found - wanted).norm() <= 4e-3 * wanted.norm()


@pytest.mark.parametrize(
    ("up", "down", "dtype", "error", "words"),
    [
        (1e6, 1e6, "float16", NonFiniteWeights, r"conv_in: .*dtype='float32'"),
        (1e-9, 1e-9, "float16", OutputError, r"conv_in: .*too small.*dtype='float32'"),
        (math.nan, 1.0, "float32", NonFiniteWeights, "conv_in"),
        (math.inf, 1.0, "float32", NonFiniteWeights, "conv_in"),
    ],
)
def test_what_a_dtype_cannot_hold_is_not_written_and_named(tmp_path, up, down, dtype, error, words):
    out = tmp_path / "out.safetensors"
    with pytest.raises(error, match=words):
        prolora.convert(scaled(up, down), out=out, dtype=dtype)
    assert list(tmp_path.iterdir()) == []
    if up == 1e6:
        prolora.convert(scaled(up, down), out=out, dtype="float32")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tensors: dict(list(tensors.items())[3:]), "with other modules than written: no "),
        (lambda tensors: {k: x * 2 if not x.dim() else x for k, x in tensors.items()}, "scale"),
        (lambda tensors: tensors | pair("lora_unet_conv_out", (2, 2)), "conv_out was not written"),
    ],
    ids=["missing", "scale", "foreign"],
)
def test_an_output_that_fails_leaves_the_old_file_as_it_was(tmp_path, monkeypatch, spoil, said):
    path = kohya_file(tmp_path / "out.safetensors")
    before, encode = path.read_bytes(), encoding.encode_adapter
    monkeypatch.setattr(encoding, "encode_adapter", lambda *given: spoil(encode(*given)))
    with pytest.raises(OutputError, match=said):
        prolora.convert(adapter_of(LINEAR), out=path, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("shapes", "format", "message"),
    [
        ({"transformer_blocks.0.attn.to_q": (6, 5)}, "comfy", "different names in the comfy"),
        ({"text_encoder_3.encoder.x": (6, 5)}, "kohya", "no name in the kohya format"),
        (ALL, "peft", "a PEFT folder holds one model"),
        ({"text_encoder_2.text_model.encoder.layers.0.mlp.fc1": (6, 5)}, "peft", "one model"),
    ],
)
def test_a_format_that_cannot_hold_the_adapter_is_refused(tmp_path, shapes, format, message):
    with pytest.raises(UnsupportedFormat, match=message):
        prolora.convert(adapter_of(shapes), out=tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


def test_an_update_that_does_not_fit_its_kernel_is_refused():
    adapter = replace(adapter_of({"conv_in": (6, 5)}), kernels={"conv_in": (3, 3)})
    with pytest.raises(ShapeMismatch, match="does not fit a kernel"):
        prolora.convert(adapter).state_dict()


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(ALL)), st.integers(1, 6), min_size=1),
    st.sampled_from(["kohya", "diffusers", "comfy"]),
    st.sampled_from(["diffusers", "sgm"]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_any_adapter_survives_any_format(tmp_path_factory, ranks, format, spelling, dtype):
    out = tmp_path_factory.mktemp("out") / "out.safetensors"
    adapter = adapter_of({n: ALL[n] for n in ranks}, list(ranks.values()), spelling=spelling)
    prolora.convert(adapter, out=out, format=format, dtype=dtype)
    back = prolora.convert(out).adapter
    same_updates(adapter, dense(back), max(8 * torch.finfo(dtype).eps, 1e-6))
    assert (back.format, back.kernels) == (format, adapter.kernels)
    assert {name: update.rank for name, update in back.updates.items()} == ranks
    assert prolora.convert(back).state_dict().keys() == prolora.Lora.open(out).tensors.keys()


@pytest.mark.parametrize("spelling", ["diffusers", "sgm"])
def test_a_lora_of_sdxl_has_kohyas_own_names_whatever_it_came_in(spelling):
    """A1111 misses embeddings and upsamplers under diffusers' names, silently."""
    shapes = {
        "add_embedding.linear_1": (1280, 2816),
        "up_blocks.0.upsamplers.0.conv": (1280, 1280, 3, 3),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (640, 2048),
    }
    adapter = adapter_of(shapes, format="diffusers", spelling=spelling)
    names = ("label_emb_0_0", "output_blocks_2_2_conv")
    names += ("input_blocks_4_1_transformer_blocks_0_attn2_to_k",)
    written = {key.partition(".")[0] for key in read_written(adapter, format="kohya")[0]}
    assert written == {f"lora_unet_{name}" for name in names}
