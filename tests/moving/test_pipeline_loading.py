"""A moved LoRA in a diffusers pipeline, without a file in between."""

import io
import logging

import pytest
import torch
from lora_files import same_bits

import prolora
from prolora import TransferOptions
from prolora.cli.console import PlainFormatter
from prolora.errors import InvalidOption, UnsupportedFormat
from prolora.fitting.pipelines.pipeline_opening import hide_progress_bars

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
import tiny_pipelines  # noqa: E402

COPY = TransferOptions(method="copy", strength=1.0)


@pytest.fixture
def case(tmp_path):
    """The source's folder, a pipeline of the target, and a LoRA file."""
    source, target = tiny_pipelines.save(tmp_path / "s"), tiny_pipelines.save(tmp_path / "t")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(target)
    pipe.set_progress_bar_config(disable=True)
    updates = tiny_pipelines.updates(pipe.unet, ("attn1.to_q", "ff.net.2"))
    return source, pipe, tiny_pipelines.write_lora(tmp_path / "lora.safetensors", updates)


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    known = {"num_inference_steps": 2, "output_type": "np", "generator": generator}
    return torch.from_numpy(pipe("a b", **known).images)


def test_the_images_are_those_of_the_written_file(case, tmp_path):
    source, pipe, lora = case
    plain = draw(pipe)
    report = prolora.load_moved_lora(pipe, lora, source, adapter_name="style", options=COPY)
    assert report.coverage == 1 and pipe.get_active_adapters() == ["style"]
    loaded = draw(pipe)
    pipe.unload_lora_weights()
    asked = {"method": "copy", "format": "diffusers", "again": True}
    prolora.transfer(lora, source, tmp_path / "t", out=tmp_path / "o.safetensors", **asked)
    pipe.load_lora_weights(tmp_path / "o.safetensors")
    written = draw(pipe)
    assert torch.equal(loaded, written) and not torch.equal(loaded, plain)


def test_a_second_lora_moves_to_the_base_and_leaves_the_first_attached(case):
    source, pipe, lora = case
    prolora.load_moved_lora(pipe, lora, source, adapter_name="one", options=COPY)
    alone = draw(pipe)
    report = prolora.load_moved_lora(
        pipe, lora, source, adapter_name="two", adapter_weight=0.5, options=COPY
    )
    assert report.coverage == 1 and pipe.get_active_adapters() == ["two"]
    half = draw(pipe)
    pipe.set_adapters(["one"], [0.5])
    assert torch.equal(draw(pipe), half) and not torch.equal(half, alone)


def test_a_pipeline_with_a_merged_adapter_is_no_base(case):
    source, pipe, lora = case
    prolora.load_moved_lora(pipe, lora, source, options=COPY)
    pipe.fuse_lora()
    with pytest.raises(UnsupportedFormat, match="unfuse"):
        prolora.load_moved_lora(pipe, lora, source, options=COPY)


def test_what_loads_no_loras_is_refused_before_any_work(case):
    source, _, lora = case
    with pytest.raises(InvalidOption, match="loads no LoRAs"):
        prolora.load_moved_lora(object(), lora, source)


def test_a_model_takes_the_lora_through_peft_alone(case):
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    source, pipe, lora = case
    done = prolora.transfer(lora, source, pipe, method="copy")
    pipe.unet.add_adapter(LoraConfig(**done.peft_config()))
    tensors = {
        key.removeprefix("base_model.model."): tensor
        for key, tensor in done.state_dict("peft").items()
    }
    left = set_peft_model_state_dict(pipe.unet, tensors)
    assert not left.unexpected_keys
    held = get_peft_model_state_dict(pipe.unet)
    assert same_bits(*({key: x.float() for key, x in some.items()} for some in (held, tensors)))
    layers = [layer for layer in pipe.unet.modules() if hasattr(layer, "lora_A")]
    assert {factor for layer in layers for factor in layer.scaling.values()} == {1.0}


def test_what_libraries_say_while_they_load_goes_through_prolora_s_log(capsys):
    """transformers writes names of a file's tensors, and control characters of its own."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    handler.setFormatter(PlainFormatter("%(levelname)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    theirs = logging.getLogger("transformers")
    before = list(theirs.handlers)
    try:
        with hide_progress_bars():
            assert len(theirs.handlers) == len(before) - 1
            pytest.importorskip("transformers").utils.logging.get_logger("transformers.x").warning(
                "\x1b[1mbold\x9b"
            )
    finally:
        logging.getLogger().removeHandler(handler)
    assert "bold" in said.getvalue() and not {"\x1b", "\x9b"} & {*said.getvalue()}
    assert "bold" not in capsys.readouterr().err
    assert not theirs.propagate and {*theirs.handlers} == {*before}
