"""Biases, normalisation layers and text encoders through a whole transfer."""

import pytest
import torch
from lora_files import read_lora
from mini import lora_tensors, source_weights, target_weights, write_case
from safetensors.torch import save_file

import prolora
from prolora import Adapter, LowRank
from prolora.bases.identity import name_base
from prolora.errors import ShapeMismatch, UnsupportedFormat

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
STEM = "lora_unet_" + BLOCK.replace(".", "_")
ENCODER = "text_encoder.text_model.encoder.layers.0"
NORMS = {
    f"{STEM}_norm1.w_norm": torch.full((24,), 2.0),
    f"{STEM}_norm1.b_norm": torch.full((24,), 3.0),
    f"{STEM.replace('blocks_0', 'blocks_2')}_norm1.w_norm": torch.ones(24),
    f"{STEM}_norm9.w_norm": torch.ones(24),
    f"{STEM}_norm2.w_norm": torch.ones(7),
    "lora_te_text_model_encoder_layers_0_layer_norm1.w_norm": torch.ones(8),
}
TEXT = {
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(8, 2),
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8),
}


@pytest.fixture
def bases(tmp_path):
    return write_case(tmp_path)[1:]


def moved(tmp_path, bases, tensors, **options):
    save_file(tensors, tmp_path / "in")
    report = prolora.transfer(
        tmp_path / "in", *bases, out=tmp_path / "out", overwrite=True, **options
    ).report
    return report, read_lora(tmp_path / "out")


def test_norms_go_where_the_matrices_of_their_block_go(tmp_path, bases):
    report, adapter = moved(tmp_path, bases, lora_tensors() | NORMS, method="copy", strength=0.5)
    expected = {
        f"{BLOCK}.norm1.weight": 1.0,
        f"{BLOCK}.norm1.bias": 1.5,
        f"{ENCODER}.layer_norm1.weight": 1.0,
    }
    assert {name: vector[0].item() for name, vector in adapter.vectors.items()} == expected
    assert report.vectors == 3
    # The dropped block and one of another width, each by name; a norm no vocabulary has is unread.
    assert len(report.left_out) == 2
    assert "no such module of that width" in report.left_out[f"{BLOCK}.norm2.weight"]
    assert report.unread == (f"{STEM}_norm9.w_norm",)
    assert any("does not know" in row.reason for row in report.rows("skipped"))


def test_norms_follow_the_block_rule_and_not_the_name():
    place = "up_blocks.1.attentions.{}.{}".format
    source, target = (
        {f"{place(i, 'proj_in')}.weight": torch.ones(8, 8) for i in range(count)}
        for count in (3, 2)
    )
    table = {place(t, "proj_in"): place(s, "proj_in") for t, s in ((0, 0), (1, 2))}
    update = LowRank(torch.ones(8, 1), torch.ones(1, 8))
    vectors = {place(i, "norm.weight"): torch.full((8,), 1.0 + i) for i in range(3)}
    adapter = Adapter({place(2, "proj_in"): update}, vectors=vectors)
    done = prolora.transfer(adapter, source, target, match=table, method="copy")
    found = {name: vector[0].item() for name, vector in done.adapter.vectors.items()}
    assert found == {place(0, "norm.weight"): 1.0, place(1, "norm.weight"): 3.0}
    assert list(done.report.left_out) == [place(1, "norm.weight")]


def test_a_bias_stays_behind_with_the_update_of_its_module(tmp_path, bases):
    tensors = lora_tensors() | {f"{STEM}_attn1_to_q.diff_b": torch.ones(24)}
    options = dict(method="prolora", rank=4, threshold=1.0)
    save_file(tensors | TEXT, tmp_path / "in")
    report = prolora.transfer(tmp_path / "in", *bases, **options).report
    assert report.totals["mapped"] == 1  # the text encoder: no pair of drifted weights has Φ = 1
    assert "update of its module was left out" in report.left_out[f"{BLOCK}.attn1.to_q.bias"]


@pytest.mark.parametrize(("method", "tensors"), [("auto", TEXT), ("prolora", NORMS)])
def test_a_lora_of_nothing_that_is_projected_needs_no_verdict(tmp_path, bases, tensors, method):
    report, adapter = moved(tmp_path, bases, tensors, method=method)
    assert report.verdict is None and "auto" not in " ".join(report.sentences())
    assert len(adapter.updates) == (tensors is TEXT) and len(adapter.vectors) == report.vectors
    if tensors is TEXT:
        with pytest.raises(ShapeMismatch, match="left out as asked"):
            moved(tmp_path, bases, tensors, text_encoder="skip")


def test_a_format_that_cannot_hold_the_result_is_refused_before_any_weight_is_read(
    tmp_path, bases, monkeypatch
):
    from prolora import Base

    def read(base, module):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Base, "read", read)
    with pytest.raises(UnsupportedFormat, match="no keys for trained normalisation layers"):
        moved(tmp_path, bases, lora_tensors() | NORMS, format="diffusers")
    with pytest.raises(UnsupportedFormat, match="PEFT folder holds one model"):
        moved(tmp_path, bases, lora_tensors() | TEXT, format="peft")


def test_the_header_says_which_files_the_bases_were(tmp_path):
    import hashlib

    files = {}
    for name, weights in (("source", source_weights()), ("target", target_weights())):
        files[name] = tmp_path / f"{name}.safetensors"
        save_file({f"{key}.weight": tensor for key, tensor in weights.items()}, files[name])
    metadata = moved(tmp_path, files.values(), lora_tensors())[1].metadata
    for name, file in files.items():
        assert metadata[f"prolora.{name}_hash"] == name_base(prolora.open_base(file))
    assert "ss_new_sd_model_hash" not in metadata
    short = hashlib.sha256(file.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    assert metadata["ss_sd_model_hash"] == short
