"""A base of any family is accepted under its own names, and what is no diffusion model is not."""

import pytest
from checkpoints import sparse_file, sparse_gguf

from prolora import open_base
from prolora.bases.describe import describe_base
from prolora.errors import UnsupportedFormat

PREFIXES = [
    "model.diffusion_model.",
    "diffusion_model.",
    "model.diffusion_model.net.",
    "model.",
    "net.",
    "transformer.",
    "unet.",
]
# A family that nobody has published: two stacks of blocks, and layers around them.
UNKNOWN = {
    "patchify.weight": (16, 4),
    "t_embed.mlp.0.weight": (16, 8),
    "out_layer.weight": (4, 16),
    "rope_table": (3, 8),
    "out_layer.bias": (4,),
} | {
    f"{stack}.{i}.{name}.weight": shape
    for stack, blocks in (("main_layers", 3), ("text.refiner", 2))
    for i in range(blocks)
    for name, shape in {
        "self_attention.q_proj": (16, 16),
        "self_attention.kv": (32, 16),
        "ffn.up": (64, 16),
        "ada_ln.1": (96, 16),
        "norm1": (16,),
    }.items()
}
MODULES = {key.removesuffix(".weight"): s for key, s in UNKNOWN.items() if len(s) > 1}


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_a_family_that_is_not_known_is_read_under_its_own_names(prefix, tmp_path):
    stored = {prefix + key: shape for key, shape in UNKNOWN.items()}
    base = open_base(sparse_file(tmp_path / "x.safetensors", stored))
    assert base.shapes == MODULES and base.layout is None
    assert describe_base(base) == (
        "a transformer with 5 transformer blocks (3 in main_layers, 2 in text.refiner) of width 16"
    )


def test_it_is_read_as_gguf_in_float8_with_scales_and_beside_its_other_parts(tmp_path):
    pytest.importorskip("gguf")
    matrices = {key: shape for key, shape in UNKNOWN.items() if len(shape) > 1}
    assert open_base(sparse_gguf(tmp_path / "x.gguf", matrices)).shapes == MODULES
    scales = {key.replace(".weight", ".scale_weight"): ("F32", (1,)) for key in matrices}
    del scales["rope_table"]
    scales |= {"scaled_fp8": ("F8_E4M3", (2,)), "rope_table": ("F16", (3, 8))}
    large = {key: shape for key, shape in matrices.items() if key != "rope_table"}
    path = sparse_file(tmp_path / "scaled.safetensors", large, "F8_E4M3", other=scales)
    assert open_base(path).shapes == MODULES
    beside = {
        "text_encoders.qwen.model.layers.0.self_attn.q_proj.weight": (4, 4),
        "vae.decoder.conv1.weight": (4, 4, 3, 3, 3),
    }
    whole = {f"model.diffusion_model.{key}": shape for key, shape in UNKNOWN.items()} | beside
    assert open_base(sparse_file(tmp_path / "all.safetensors", whole)).shapes == MODULES


@pytest.mark.parametrize("wrapper", ["model.", "net.", "transformer.", "unet."])
def test_a_prefix_that_only_some_keys_have_is_part_of_their_names(wrapper, tmp_path):
    stored = {wrapper + key: shape for key, shape in UNKNOWN.items()} | {"head.weight": (4, 4)}
    base = open_base(sparse_file(tmp_path / "x.safetensors", stored))
    assert set(base.shapes) == {wrapper + module for module in MODULES} | {"head"}


def lay_out(stack, blocks, modules, **others):
    """Keys of `blocks` blocks with these modules, and others around them."""
    keys = {f"{stack}.{i}.{name}.weight": (8, 8) for i in range(blocks) for name in modules}
    return keys | {key.replace("__", "."): (8, 8) for key in others}


LLAMA = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "input_layernorm")
OTHERS = {
    "a language model": lay_out(
        "model.layers", 2, LLAMA, model__embed_tokens__weight=0, lm_head__weight=0
    ),
    "a language model ": lay_out("layers", 2, LLAMA),  # one shard of it
    "a language model  ": lay_out("blk", 2, ("attn_q", "ffn_up"), token_embd__weight=0),
    "a language model   ": lay_out(
        "transformer.h", 2, ("attn.c_attn",), transformer__wte__weight=0
    ),
    "a T5 encoder": lay_out("encoder.block", 2, ("layer.0.SelfAttention.q",), shared__weight=0),
    "a CLIP or SigLIP model": lay_out("text_model.encoder.layers", 2, ("self_attn.q_proj",)),
    "a CLIP or SigLIP model ": lay_out(
        "encoder.layers", 2, ("self_attn.q_proj",), embeddings__token_embedding__weight=0
    ),
    "a CLIP or SigLIP model  ": lay_out("vision_model.encoder.layers", 2, ("self_attn.q_proj",)),
    "a CLIP model": lay_out("transformer.resblocks", 2, ("attn.out_proj",)),
    "an image encoder": lay_out("blocks", 2, ("attn.qkv", "mlp.fc1"), cls_token=0),
    "a VAE": lay_out("decoder.up", 2, ("block.0.conv1", "attn.q"), decoder__conv_in__weight=0),
    "a VAE ": lay_out(
        "decoder.up_blocks", 2, ("attentions.0.to_q",), decoder__time_embed__weight=0
    ),
    "a VAE  ": lay_out("encoder.downsamples", 2, ("residual.2",), decoder__conv1__weight=0),
    "an upscaler": lay_out("layers", 2, ("blocks.0.attn.qkv",), conv_first__weight=0),
    "a training state": lay_out("blocks", 2, ("attn.qkv.exp_avg", "t_embedder.mlp.0")),
    "has no list of blocks": {"a.weight": (8, 8), "layer1.weight": (8, 8), "0.weight": (8, 8)},
    "has no list of blocks ": lay_out("model", 2, ("sub.RDB1.conv1",)),
    "has no attention in its blocks": lay_out("layers", 2, ("conv.0", "norm.1")),
    "has no list of blocks  ": {},
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_file_without_a_diffusion_model_is_refused_and_says_what_it_looks_like(what, tmp_path):
    path = sparse_file(tmp_path / "x.safetensors", OTHERS[what])
    with pytest.raises(UnsupportedFormat, match="holds no UNet or transformer") as refused:
        open_base(path)
    message = str(refused.value)
    assert str(path) in message and what.strip() in message
    assert not OTHERS[what] or any(
        key.removeprefix("transformer.").removeprefix("model.") in message for key in OTHERS[what]
    )


def test_a_language_model_with_layers_for_the_time_step_is_a_diffusion_model(tmp_path):
    """OmniGen and HunyuanImage 3 are such models."""
    stored = lay_out("layers", 2, LLAMA, embed_tokens__weight=0, t_embedder__mlp__0__weight=0)
    base = open_base(sparse_file(tmp_path / "x.safetensors", stored))
    assert len(base.shapes) == 2 * len(LLAMA) + 2
