"""LoRAs in memory: read from state dicts, and written to state dicts."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from lora_files import CONV, LINEAR, adapter_of, dense, same_updates

import prolora
from prolora import Adapter
from prolora.errors import OutputError, UnsupportedFormat

KEY = "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft", "comfy"])
def test_a_state_dict_holds_what_the_file_holds_in_memory_of_its_own(format, tmp_path):
    adapter = adapter_of(LINEAR | CONV, rank=[4, 2, 8], format="kohya", spelling="sgm")
    before = {name: update.clone() for name, update in dense(adapter).items()}
    path = tmp_path / ("folder" if format == "peft" else "x.safetensors")
    tensors = prolora.convert(adapter, format=format, dtype="float32").state_dict()
    prolora.convert(adapter, out=path, format=format, dtype="float32")
    lora = prolora.Lora.open(path)
    assert tensors.keys() == lora.tensors.keys()
    assert all(torch.equal(tensor, lora.read(key)) for key, tensor in tensors.items())
    back = prolora.convert(tensors).adapter
    assert back.kernels == adapter.kernels
    same_updates(adapter, dense(back))
    for tensor in tensors.values():
        tensor.zero_()
    same_updates(adapter, before)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_state_dict_with_its_configuration_is_read_as_the_folder_that_peft_saves(
    rslora, tmp_path
):
    peft = pytest.importorskip("peft")
    net = torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 6), "to_k": torch.nn.Linear(8, 6)})
    config = peft.LoraConfig(
        r=4, lora_alpha=3, target_modules=["to_q", "to_k"], use_rslora=rslora,
        alpha_pattern={"to_k": 10}, init_lora_weights=False,
    )  # fmt: skip
    model = peft.PeftModel(net, config)
    model.save_pretrained(tmp_path)
    state = peft.get_peft_model_state_dict(model)
    sources = (state, model.peft_config["default"]), tmp_path
    found, saved = (prolora.convert(source).adapter for source in sources)
    assert found.format == saved.format == "peft" and found.updates.keys() == saved.updates.keys()
    for name, update in found.updates.items():
        wanted = model.base_model.model[name].get_delta_weight("default")
        assert torch.allclose(update.dense(), wanted, atol=1e-6)
        assert torch.equal(update.up, saved.updates[name].up)


@pytest.mark.parametrize("attached", ["PEFT's model", "its network", "two adapters"])
def test_a_source_that_holds_the_adapter_gives_its_alpha(attached):
    peft = pytest.importorskip("peft")
    net = torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 6)})
    configs = [
        peft.LoraConfig(r=4, lora_alpha=a, target_modules=["to_q"], init_lora_weights=False)
        for a in (8, 3)
    ]
    model = peft.PeftModel(net, configs[0])
    if attached == "two adapters":
        model.add_adapter("other", configs[1])
    state = peft.get_peft_model_state_dict(model)
    target = {"to_q.weight": net["to_q"].base_layer.weight.detach() + 0.01}
    source = model.base_model if attached == "its network" else model
    moved = prolora.transfer(state, source, target, method="copy").adapter
    wanted = model.base_model.model["to_q"].get_delta_weight("default")
    assert torch.allclose(moved.updates["to_q"].dense(), wanted, atol=1e-6)


def test_a_state_dict_of_peft_without_its_alpha_is_warned_of():
    start = "base_model.model.to_q"
    state = {f"{start}.lora_A.weight": torch.ones(2, 4), f"{start}.lora_B.weight": torch.ones(4, 2)}
    base, other = {"to_q.weight": torch.eye(4)}, {"to_q.weight": 2 * torch.eye(4)}
    with pytest.warns(UserWarning, match="no alpha, and is read at scale 1"):
        prolora.transfer(state, base, other, method="copy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = SimpleNamespace(to_dict=lambda: {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
        moved = prolora.transfer((state, config), base, other, method="copy").adapter
    assert torch.equal(moved.updates["to_q"].dense(), torch.full((4, 4), 4.0))


@pytest.mark.parametrize("wrong", [3, ("a", "b"), ({}, {"r": 4}), ({}, 1), ({}, {}, {})])
def test_what_is_no_lora_is_refused_by_name(wrong):
    with pytest.raises(UnsupportedFormat, match=r"peft\.LoraConfig"):
        prolora.convert(wrong)


@pytest.mark.parametrize(
    "fields",
    [5, lambda self: {("a", 1): 2}, lambda self: [1], lambda: {}, lambda self: int("x")],
    ids=["a number", "keys that are no text", "a list", "no method", "an error"],
)
def test_what_only_looks_like_a_configuration_is_refused(fields):
    tensors = prolora.convert(adapter_of(LINEAR), format="peft").state_dict()
    with pytest.raises(UnsupportedFormat, match=r"configuration|peft\.LoraConfig"):
        prolora.convert((tensors, type("Config", (), {"to_dict": fields})()))


def test_an_adapter_without_modules_makes_no_state_dict():
    with pytest.raises(OutputError, match="no module is left"):
        prolora.convert(Adapter({})).state_dict()


UNREADABLE = {
    "complex": lambda: torch.ones(4, 2, dtype=torch.complex64),
    "meta": lambda: torch.ones(4, 2, device="meta"),
    "sparse": lambda: torch.ones(4, 2).to_sparse(),
    "sparse_csr": lambda: torch.eye(2).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(4, 2), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_tensors_without_plain_numbers_are_refused_by_name(kind):
    tensors = {KEY: UNREADABLE[kind](), KEY.replace("up", "down"): torch.ones(2, 4)}
    with pytest.raises(UnsupportedFormat, match=rf"{KEY} is .*{kind.split('_')[0]}"):
        prolora.convert(tensors)
