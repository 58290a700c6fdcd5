"""Every family at small width: a LoRA moved between bases in every form on disk."""

import pytest
import torch
from diagonal import keep_some
from safetensors.torch import save_file
from small_models import authors_weights, small_weights

import prolora
from prolora import Adapter, LowRank
from prolora.adapters import write_adapter
from prolora.architectures.families import known_families
from prolora.architectures.identify import Model

FAMILIES = {id_: family for id_, family in known_families().items() if not family.unet}
FORMS = ("diffusers", "authors", "model.diffusion_model.")


def write_base(folder, name, family, weights, form):
    """A base on disk: a folder as diffusers has it, or the authors' file with or without prefix."""
    if form == "diffusers":
        path = folder / name
        (path / "transformer").mkdir(parents=True)
        file = path / "transformer" / "diffusion_pytorch_model.safetensors"
        save_file({f"{key}.weight": weight for key, weight in weights.items()}, file)
        return path
    prefix = "" if form == "authors" else form
    named = authors_weights(family, weights)
    path = folder / f"{name}.safetensors"
    save_file({f"{prefix}{key}.weight": weight for key, weight in named.items()}, path)
    return path


def lora_on(weights):
    generator = torch.Generator().manual_seed(5)
    updates = {}
    for name, weight in weights.items():
        m, n = weight.shape
        up, down = (torch.randn(size, generator=generator) for size in ((m, 2), (2, n)))
        updates[name] = LowRank(0.1 * up, 0.1 * down)
    return updates


def check_equal(moved, wanted, tolerance=1e-6):
    assert moved.keys() == wanted.keys()
    for name, update in wanted.items():
        error = (moved[name].dense().double() - update.dense().double()).norm()
        assert error <= tolerance * update.dense().double().norm(), name


def write_bases(folder, family, old, new):
    """{form: (source, target)}."""
    bases = {}
    for form in FORMS:
        (there := folder / form.strip(".")).mkdir()
        ends = {"old": old, "new": new}.items()
        bases[form] = tuple(write_base(there, name, family, x, form) for name, x in ends)
    return bases


# SD3 fuses matrices and swaps halves, Wan has other names alone: the kinds that there are.
@pytest.mark.parametrize("family", keep_some(FAMILIES, "sd3", "wan"))
def test_a_lora_moves_between_bases_in_every_form(tmp_path, family):
    """In one spelling; `test_exact_copies` has the others. A projection is the same in each."""
    layout = FAMILIES[family].layouts[0]
    old, new = small_weights(layout), small_weights(layout, drift=0.1)
    updates, lora, projected = lora_on(old), tmp_path / "lora.safetensors", []
    adapter, spelling = Adapter(updates, origin=Model.of(family)), [*FAMILIES[family].spellings][-1]
    write_adapter(adapter, lora, format=spelling)
    for form, (source, target) in write_bases(tmp_path, family, old, new).items():
        for base, weights in ((source, old), (target, new)):
            opened = prolora.open_base(base)
            assert opened.family in (family, FAMILIES[family].rarer_than), form
            assert all(torch.equal(opened.read(name), weights[name]) for name in weights), form
        copied = prolora.transfer(lora, source, target, method="copy")
        check_equal(copied.adapter.updates, updates)
        assert copied.report.coverage == 1
        if family == "sd3":
            moved = prolora.transfer(lora, source, target, method="prolora", rank=8)
            projected.append(moved.adapter.updates)
            check_equal(projected[-1], projected[0], 1e-5)
