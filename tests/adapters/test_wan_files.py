"""LoRAs for Wan as people have them: norms, biases, and tensors that are no matrices."""

import pytest
import torch
from lora_files import lora_on, pair, relative_error, save

import prolora
from prolora.errors import UnsupportedFormat

WIDTH = 80


def wan_file():
    tensors, start = {}, "diffusion_model.blocks.0"
    for attention in ("self_attn", "cross_attn"):
        for part in "qkvo":
            tensors |= pair(f"{start}.{attention}.{part}", (WIDTH, WIDTH), 2)
            tensors[f"{start}.{attention}.{part}.diff_b"] = torch.randn(WIDTH)
        tensors[f"{start}.{attention}.norm_q.diff"] = torch.randn(WIDTH)
    tensors |= pair(f"{start}.ffn.0", (216, WIDTH), 2) | pair(f"{start}.ffn.2", (WIDTH, 216), 2)
    norm = {f"{start}.norm3.{role}": torch.randn(WIDTH) for role in ("diff", "diff_b")}
    return tensors | norm


NO_MATRICES = {
    "diffusion_model.blocks.0.diff_m": torch.randn(1, 6, WIDTH),
    "diffusion_model.blocks.0.modulation.diff": torch.randn(1, 6, WIDTH),
}


def test_norms_and_biases_keep_their_names_and_what_is_no_matrix_is_left_out_by_name(tmp_path):
    tensors = wan_file()
    converted = prolora.convert(tensors | NO_MATRICES)
    assert converted.adapter.model.family == "wan"
    assert converted.report.left_out.keys() | {*converted.report.unread} == NO_MATRICES.keys()
    assert (
        "blocks.0.attn1.to_q" in converted.adapter.updates and len(converted.adapter.vectors) == 12
    )
    written = converted.state_dict()
    for key, tensor in tensors.items():
        if key.endswith(("diff", "diff_b")):
            suffixes = (".diff_b", ".b_norm") if key.endswith("_b") else (".w_norm",)
            stem = key.rpartition(".")[0]
            assert any(torch.equal(written.get(stem + s, torch.zeros(1)), tensor) for s in suffixes)
    # A table, a modulation and factors of an unknown module alike: shares are of what was read.
    odd = {"odd.lora_up.weight": torch.randn(8, 2), "odd.lora_down.weight": torch.randn(2, 8)}
    for more in (*({key: tensor} for key, tensor in NO_MATRICES.items()), odd):
        words = str(prolora.convert(save(tmp_path / "x", tensors | more)).report.in_words())
        assert "of the energy of what was read of" in words
        assert "could not be read and stays behind" in words


PATCHES, CORE = "diffusion_model.patch_embedding", (4, 4, 1, 2, 2)


def volumes():
    """Updates over time, of one ΔW: factors, a difference, a LoKr, a Tucker core."""
    up, down = torch.randn(WIDTH, 2, 1, 1, 1), torch.randn(2, 16, 1, 2, 2)
    whole = torch.einsum("or,rikhw->oikhw", up.flatten(1), down)
    core = {"lora_up": up, "lora_mid": down, "lora_down": torch.eye(16).reshape(16, 16, 1, 1, 1)}
    small, large = torch.ones(1, 1), whole
    yield {"lora_up.weight": up, "lora_down.weight": down}, whole
    yield {"diff": whole}, whole
    yield {"lokr_w1": small, "lokr_w2": large}, whole
    core |= {"lora_up": torch.cat([up, torch.zeros(WIDTH, 14, 1, 1, 1)], 1)}
    core |= {"lora_mid": torch.cat([down, torch.zeros(14, 16, 1, 2, 2)])}
    yield {f"{role}.weight": tensor for role, tensor in core.items()}, whole


@pytest.mark.parametrize("number", range(4))
def test_an_update_of_a_convolution_over_time_is_moved_whatever_its_kind(number, tmp_path):
    torch.manual_seed(number)
    tensors, whole = list(volumes())[number]
    tensors = {f"{PATCHES}.{suffix}": tensor for suffix, tensor in tensors.items()}
    tensors |= {f"{PATCHES}.diff_b": torch.randn(WIDTH)}
    converted = prolora.convert(wan_file() | tensors)
    adapter = converted.adapter
    assert not converted.report.left_out and adapter.kernels == {"patch_embedding": (1, 2, 2)}
    assert relative_error(adapter.updates["patch_embedding"].dense(), whole.flatten(1)) < 1e-6
    written = converted.state_dict()
    up, down = (written[f"{PATCHES}.lora_{role}.weight"] for role in "BA")
    assert up.shape[2:] == (1, 1, 1) and down.shape[1:] == (16, 1, 2, 2)  # as PEFT's Conv3d
    lora = save(tmp_path / "wan.safetensors", wan_file() | tensors)
    base = {"patch_embedding.weight": torch.randn(WIDTH, 16, 1, 2, 2)}
    base |= {
        f"{name}.weight": torch.randn(*update.shape)
        for name, update in adapter.updates.items()
        if name != "patch_embedding"
    }
    moved = prolora.transfer(lora, base, base, method="copy", again=True)
    assert moved.report.coverage == 1 and not moved.report.unread
    written = moved.adapter
    assert written.kernels == adapter.kernels
    assert relative_error(written.updates["patch_embedding"].dense(), whole.flatten(1)) < 2e-3


FIVE = {
    "locon": {"lora_up.weight": (8, 4, 1, 1, 1), "lora_down.weight": (4, 16, 1, 2, 2)},
    "tucker": {"lora_up.weight": (8, 4), "lora_down.weight": (4, 16), "lora_mid.weight": CORE},
    "loha": {f"hada_w{i}_{side}": (4, n) for i in (1, 2) for side, n in (("a", 8), ("b", 16))}
    | {f"hada_t{i}": CORE for i in (1, 2)},
    "lokr": {"lokr_w1": (2, 4), "lokr_w2_a": (4, 4), "lokr_w2_b": CORE},
    "full": {"diff": (8, 16, 1, 2, 2)},
    "glora": {"a1": (16, 4), "a2": (4, 16), "b1": (8, 4, 1, 1, 1), "b2": (4, 16, 1, 2, 2)},
}


@pytest.mark.parametrize("kind", FIVE)
def test_every_kind_is_read_over_time_and_none_beyond(kind):
    dots = ".weight" if kind == "glora" else ""
    tensors = {f"{PATCHES}.{role}{dots}": torch.ones(s) for role, s in FIVE[kind].items()}
    base = {"patch_embedding.weight": torch.ones(8, 16, 1, 2, 2)}
    adapter = prolora.convert(tensors, base).adapter
    assert adapter.updates["patch_embedding"].shape == (8, 64)
    assert adapter.kernels == {"patch_embedding": (1, 2, 2)}
    beyond = {k: x[..., None] if x.dim() == 5 else x for k, x in tensors.items()}
    with pytest.raises(prolora.ProLoRAError):
        prolora.convert(beyond, base)


TEXT_ATTENTION = [f"blocks.{n}.attn2.to_{p}" for n in range(40) for p in "qkv"]
ANIMATE = [f"face_adapter.{n}.to_{p}" for n in range(8) for p in ("q", "k", "v", "out")]
SPEECH = [f"audio_injector.injector.{n}.{p}" for n in range(12) for p in "qkvo"]


@pytest.mark.parametrize(
    ("layout", "further"), [("wan2.2-animate-14b", ANIMATE), ("wan2.2-s2v-14b", SPEECH)]
)
def test_comfyui_reads_all_of_animate_and_speech(layout, further):
    """The counts: bench/results/loaders.json."""
    made = prolora.convert(
        lora_on(layout, "transformer.", TEXT_ATTENTION + further), format="comfy"
    )
    found = prolora.check(made, program="comfyui")
    assert found.sizes == (layout,) and str(found).startswith("✔ ComfyUI applies all of it")
    again = prolora.convert(made, format="comfyui")
    assert again.state_dict().keys() == made.state_dict().keys()


def test_an_untried_module_is_not_called_unread():
    lora = {
        "diffusion_model.motion_encoder.enc.net_app.convs.1.conv1.0.lora_A.weight": (2, 32, 3, 3),
        "diffusion_model.motion_encoder.enc.net_app.convs.1.conv1.0.lora_B.weight": (32, 2, 1, 1),
    }
    tensors = {key: torch.ones(shape) for key, shape in lora.items()}
    with pytest.raises(UnsupportedFormat, match=r"was not tried .* change motion_encoder.*name a"):
        prolora.convert(tensors | wan_file(), format="comfyui")
