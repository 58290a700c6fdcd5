"""Models of two experts: which is which, by folders and names, and never by guessing."""

from types import SimpleNamespace

import pytest
import torch
from experts import expert, write_file, write_pipeline

import prolora
from prolora.bases.experts import HIGH, LOW, choose_pairs, find_expert, pair_experts
from prolora.errors import UnsupportedFormat

NAMES = {
    HIGH: """wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors high_noise_model
        Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled.safetensors""",
    LOW: """wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors Wan2.2-T2V-A14B-LowNoise-Q4_K_M.gguf
        wan22-style-low.safetensors""",
    None: """my_low_angle_shot.safetensors slow_motion_high_res.safetensors shallow.safetensors
        wan2.1_t2v_14B.safetensors high_noise_and_low_noise.safetensors HIGHLIGHT_v2.safetensors""",
}


@pytest.mark.parametrize("wanted", NAMES)
def test_names_tell_the_expert_or_nothing(wanted):
    for name in NAMES[wanted].split():
        assert find_expert(name) == wanted, name


def test_a_pipeline_of_two_transformers_has_two_experts(tmp_path):
    experts = prolora.open_experts(write_pipeline(tmp_path / "wan22"))
    names = {name: base.name for name, base in experts.items()}
    assert names == {HIGH: "wan22/transformer", LOW: "wan22/transformer_2"}
    name = "blocks.0.attn1.to_q"
    for seed, base in enumerate(experts.values(), 1):
        assert torch.equal(base.read(name), expert(seed)[f"{name}.weight"])
    assert prolora.open_experts(experts) is experts
    memory = prolora.open_experts([expert(1), expert(2)])  # in the order of their use
    assert list(memory) == [HIGH, LOW]
    assert torch.equal(memory[LOW].read(name), expert(2)[f"{name}.weight"])


def test_it_is_no_single_base_and_each_part_is_one(tmp_path):
    folder = write_pipeline(tmp_path / "wan22")
    with pytest.raises(UnsupportedFormat, match=r"has two experts, .*transformer for high noise"):
        prolora.open_base(folder)
    for seed, part in ((1, "transformer"), (2, "transformer_2")):
        for base in (prolora.open_base(folder / part), prolora.open_base(folder, subfolder=part)):
            weight = base.read("blocks.1.ffn.net.2")
            assert torch.equal(weight, expert(seed)["blocks.1.ffn.net.2.weight"])


def test_two_files_are_told_by_their_names_whatever_their_order(tmp_path):
    low = write_file(tmp_path / "model_low_noise.safetensors", expert(2))
    high = write_file(tmp_path / "model_high_noise.safetensors", expert(1))
    for pair in ([low, high], (str(high), str(low))):
        found = prolora.open_experts(pair)
        names = {name: base.path.name for name, base in found.items()}
        assert names == {HIGH: high.name, LOW: low.name}
    folder = write_pipeline(tmp_path / "wan22")
    found = prolora.open_experts([folder / "transformer_2", folder / "transformer"])
    assert found[HIGH].path == folder / "transformer"


def test_two_files_whose_names_do_not_tell_are_refused(tmp_path):
    one, two = (write_file(tmp_path / f"{x}.safetensors", expert(1)) for x in ("one", "two"))
    high = write_file(tmp_path / "a_high_noise.safetensors", expert(1))
    for pair in ([one, two], [high, two], [high, high]):
        with pytest.raises(UnsupportedFormat, match="names do not tell which is which"):
            prolora.open_experts(pair)
    with pytest.raises(UnsupportedFormat, match="not 3 bases"):
        prolora.open_experts([one, two, high])


def test_a_loaded_pipeline_of_two_transformers_is_no_single_base():
    models = [torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})] * 2
    pipeline = SimpleNamespace(transformer=models[0], transformer_2=models[1])
    with pytest.raises(UnsupportedFormat, match="its transformer for high noise"):
        prolora.open_base(pipeline)


def test_a_base_without_experts_serves_both():
    one = prolora.open_experts(expert(3))
    two = prolora.open_experts([expert(1), expert(2)])
    assert list(one) == [""]
    (alone,) = pair_experts(one, one)
    assert alone.expert == ""
    up = pair_experts(one, two)
    assert [(p.expert, p.source.weights, p.target.weights) for p in up] == [
        (HIGH, one[""].weights, two[HIGH].weights),
        (LOW, one[""].weights, two[LOW].weights),
    ]
    across = pair_experts(two, two)
    pairs = [(p.source.weights, p.target.weights) for p in across]
    assert pairs == [(two[HIGH].weights,) * 2, (two[LOW].weights,) * 2]
    assert not any(p.serves_any for p in pair_experts(two, one))


def test_a_lora_goes_to_the_expert_that_its_name_tells_and_else_to_both(tmp_path):
    one, two = prolora.open_experts(expert(3)), prolora.open_experts([expert(1), expert(2)])
    pairs = pair_experts(one, two)
    assert choose_pairs(tmp_path / "x.safetensors", pairs) == [
        (pairs[0], "_high_noise"),
        (pairs[1], "_low_noise"),
    ]
    assert choose_pairs(tmp_path / "x_low_noise.safetensors", pairs) == [(pairs[1], "")]
    down = pair_experts(two, one)
    assert choose_pairs(tmp_path / "x_HIGH.safetensors", down) == [(down[0], "")]
    with pytest.raises(UnsupportedFormat, match="name tells neither"):
        choose_pairs(tmp_path / "x.safetensors", down)
