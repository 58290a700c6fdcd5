"""Every verb takes bases whose tensors are on another device than those it is compared with."""

import pytest
import torch
from elsewhere import Elsewhere, move
from mini import source_weights, target_weights, write_case
from safetensors.torch import load_file, save_file

import prolora


@pytest.fixture
def case(request, tmp_path):
    """(LoRA, source, target) of tensors, one or both of which are elsewhere; and as files."""
    elsewhere = getattr(request, "param", "both")
    files = write_case(tmp_path)
    sides = {"source": source_weights(), "target": target_weights()}
    for side, weights in sides.items():
        tensors = {f"{name}.weight": tensor for name, tensor in weights.items()}
        if elsewhere in (side, "both"):
            tensors = {name: move(tensor) for name, tensor in tensors.items()}
        sides[side] = tensors
    return files, (files[0], sides["source"], sides["target"])


def test_the_stand_in_refuses_operands_of_two_devices():
    there, here = move(torch.ones(2, 2)), torch.ones(2, 2)
    assert isinstance(there @ there.mT, Elsewhere) and type(there.cpu()) is torch.Tensor
    for mix in (lambda: there @ here, lambda: here + there, lambda: torch.stack([here, there])):
        with pytest.raises(RuntimeError, match="same device"):
            mix()


@pytest.mark.parametrize(
    ("case", "method"),
    [("source", "auto"), ("target", "prolora"), ("both", "copy")],
    indirect=["case"],
)
def test_a_transfer_gives_what_it_gives_from_files(case, tmp_path, method):
    files, there = case
    out = [tmp_path / f"{name}.safetensors" for name in ("files", "there")]
    for one, path in zip((files, there), out, strict=True):
        prolora.transfer(*one, out=path, method=method)
    first, second = map(load_file, out)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def test_check_compares_two_bases_and_one_with_a_lora(case):
    (lora, _, _), (_, source, target) = case
    verdict = prolora.check(lora, source=source, target=target)
    assert verdict.move is not None and "in part" in str(verdict.move)
    assert prolora.check(lora, base=source).base_match


def test_extract_gives_the_lora_between_two_bases(case, tmp_path):
    _, (_, source, target) = case
    shared = {f"{name}.weight" for name in target_weights()}
    source = {name: tensor for name, tensor in source.items() if name in shared}
    there = any(isinstance(tensor, Elsewhere) for tensor in source.values())
    source["conv_norm_out.bias"] = move(torch.zeros(24)) if there else torch.zeros(24)
    target |= {"conv_norm_out.bias": torch.ones(24)}
    made = prolora.extract(source, target, out_rank=4)
    assert made.report.coverage and len(made.adapter.updates) == len(shared)
    assert [norm.tolist() for norm in made.adapter.vectors.values()] == [[1.0] * 24]


def test_a_pipeline_takes_a_lora_wherever_its_weights_are(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    import tiny_pipelines

    source, target = (tiny_pipelines.save(tmp_path / name) for name in ("source", "target"))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(target)
    updates = tiny_pipelines.updates(pipe.unet, ("attn1.to_q",))
    lora = tiny_pipelines.write_lora(tmp_path / "lora.safetensors", updates)
    weights = pipe.unet.state_dict()
    pipe.unet.state_dict = lambda: {name: move(tensor) for name, tensor in weights.items()}
    report = prolora.load_moved_lora(pipe, lora, source, strength=1.0)
    assert report.coverage == 1 and len(pipe.get_active_adapters()) == 1


@pytest.mark.parametrize("verb", ["convert", "merge"])
def test_an_update_that_needs_its_base_gets_it(case, tmp_path, verb):
    (lora, on_disk, _), (_, source, _) = case
    tensors = load_file(lora)
    for key in [key for key in tensors if key.endswith("lora_up.weight")]:
        tensors[key.replace("lora_up.weight", "dora_scale")] = torch.ones(24, 1)
    save_file(tensors, lora)
    made = []
    for base in (on_disk, source):
        if verb == "convert":
            made.append(prolora.convert(lora, base, out_rank=4))
        else:
            made.append(prolora.merge([lora, lora], base, out_rank=4))
    first, second = (one.adapter.updates for one in made)
    assert first.keys() == second.keys() and first
    for name in first:
        torch.testing.assert_close(
            first[name].up @ first[name].down, second[name].up @ second[name].down
        )


def test_a_state_dict_is_baked_where_it_is(case):
    (lora, _, _), (_, source, _) = case
    stored = {f"{name}.weight": weight for name, weight in source_weights().items()}
    expected = prolora.bake([lora], stored)
    report = prolora.bake([lora], source)
    assert report.to_dict()["modules"] == expected.to_dict()["modules"]
    for key, tensor in report.tensors.items():
        assert type(tensor) is type(source[key])
        assert torch.equal(tensor.cpu(), expected.tensors[key])
