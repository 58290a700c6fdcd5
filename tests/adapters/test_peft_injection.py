"""What prolora writes for PEFT and for diffusers, both put into diffusers' own classes.

The models have their published size and no weights: they are made on the meta device.
"""

from __future__ import annotations

import pytest
import torch
from family_loras import is_early, make_updates
from lora_files import adapter_for
from published_elsewhere import ELSEWHERE
from published_models import PUBLISHED
from published_others import OTHERS
from published_unets import UNETS
from published_videos import VIDEOS

import prolora
from prolora.architectures.families import known_families

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
from make_layouts import build_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
MODELS = {**PUBLISHED, **VIDEOS, **OTHERS, **UNETS}
FAMILIES = {
    id_: family
    for id_, family in known_families().items()
    if family.layouts[0] not in ELSEWHERE  # diffusers has no class to put a LoRA into
}


USUAL = [id_ for id_, family in FAMILIES.items() if not family.unet or id_ in ("sd15", "ssd-1b")]
"""UNets have one class, and the larger ones take seconds."""


def every_fourth(first):
    """Families that the other test does not take; the rest is slow."""
    early = USUAL[first::4]
    return pytest.mark.parametrize(
        "given",
        [pytest.param(id_, marks=() if id_ in early else pytest.mark.slow) for id_ in FAMILIES],
        indirect=True,
        scope="module",
    )


@pytest.fixture(scope="module")
def given(request):
    """A family, the class of its first published size, and an adapter of that; made once.

    It has updates of all linear layers of the first two blocks of every list.
    """
    family = FAMILIES[request.param]
    published = MODELS[family.layouts[0]]
    if not hasattr(diffusers, published.cls):
        pytest.skip(f"this diffusers has no {published.cls}")
    model = build_model(published)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    updates = make_updates(family.layouts[0], linear.__contains__)
    assert updates.keys() == {name for name in linear if is_early(name)}
    return request.param, model, adapter_for(request.param, updates)


def check_layers(model, updates, name):
    """The layers that PEFT put in are those of the adapter: none less, none more, the scale 1."""
    layers = {
        path.removeprefix("base_model.model."): module
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer) and name in module.lora_A
    }
    assert layers.keys() == updates.keys()
    for path, update in updates.items():
        up, down = (getattr(layers[path], x)[name].weight for x in ("lora_B", "lora_A"))
        assert (up.shape, down.shape) == (update.up.shape, update.down.shape)
        assert layers[path].scaling[name] == 1


@every_fourth(0)
def test_diffusers_loads_the_state_dict_into_the_class_and_misses_no_key(given, monkeypatch):
    id_, model, adapter = given
    if not hasattr(model, "load_lora_adapter"):
        pytest.skip(f"{type(model).__name__} has no LoRAs in diffusers")
    results, load = [], peft.set_peft_model_state_dict

    def load_and_keep(*args, **kwargs):
        results.append(load(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(peft, "set_peft_model_state_dict", load_and_keep)
    model.load_lora_adapter(
        prolora.convert(adapter, format="diffusers").state_dict(),
        prefix="unet" if FAMILIES[id_].unet else "transformer",
        adapter_name="first",
        low_cpu_mem_usage=True,
    )
    missing = [key for key in results[0].missing_keys if ".lora_" in key]
    assert not missing and not results[0].unexpected_keys
    # Anima's adapter of text is a model of its own in diffusers (test_diffusers_readers.py).
    own = {name: x for name, x in adapter.updates.items() if not name.startswith("llm_adapter.")}
    check_layers(model, own, "first")


@every_fourth(2)
def test_peft_loads_the_folder_into_the_class_and_misses_no_key(given, tmp_path):
    id_, model, adapter = given
    if (spelling := FAMILIES[id_].spellings.get("peft")) and spelling.names == "authors":
        pytest.skip("the authors' own class, whose names the folder has, is not installed")
    folder = str(tmp_path / "lora")
    prolora.convert(adapter, out=folder, format="peft")
    config = peft.PeftConfig.from_pretrained(folder)
    wrapped = peft.PeftModel(model, config, "second", low_cpu_mem_usage=True)
    result = wrapped.load_adapter(folder, "second", low_cpu_mem_usage=True)
    assert not result.missing_keys and not result.unexpected_keys
    check_layers(wrapped, adapter.updates, "second")
