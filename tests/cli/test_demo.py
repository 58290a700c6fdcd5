"""The demo: the shipped family is whole, and what it writes is what it shows."""

import base64
import json

import pytest
import torch

from prolora import ProLoRAError, adapters, open_base
from prolora.cli import demo


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "target"), [("thick", "pruned"), ("slanted", "finetuned")])
def test_the_demo_writes_the_lora_the_reports_and_a_picture(tmp_path, lora, target):
    from PIL import Image

    steps = []
    report, paths = demo.run_demo(
        tmp_path / "out", lora=lora, target=target, progress=lambda *step: steps.append(step)
    )
    moved, account, picture, page = paths
    assert json.loads(account.read_text())["totals"]["mapped"] == report.totals["mapped"] > 0
    assert len(adapters.read_adapter(moved).updates) == report.totals["mapped"]
    with Image.open(picture) as image:
        assert image.size[1] == 5 * (16 * demo.SCALE + 4)
    assert base64.b64encode(picture.read_bytes()).decode() in page.read_text("utf-8")
    assert steps[-1][0] == steps[-1][1] == 5


def test_the_shipped_family_is_what_its_page_says():
    family = demo.find_models()
    source, pruned, tuned = (open_base(family / n) for n in ("source", "pruned", "finetuned"))
    for lora, alpha in (("thick", 8), ("slanted", 4)):
        adapter = adapters.read_adapter(family / "loras" / f"{lora}.safetensors")
        assert len(adapter.updates) == 252 and set(adapter.updates) <= set(source.shapes)
        assert {update.rank for update in adapter.updates.values()} == {8}
        assert adapter.metadata["ss_network_alpha"] in (str(alpha), str(float(alpha)))
    assert tuned.shapes == source.shapes
    assert all(source.shapes[name] == shape for name, shape in pruned.shapes.items())


def test_merging_adds_the_update_and_leaves_the_original_alone():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    before = model[0].weight.clone()
    update = demo.Adapter({"0": adapters.adapter.LowRank(torch.ones(3, 1), torch.ones(1, 4))})
    changed = demo.merge_adapter(model, update)
    torch.testing.assert_close(changed[0].weight, before + 1)
    assert torch.equal(model[0].weight, before)


def test_the_demo_offers_the_methods_that_it_can_show(prolora, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert "probe" not in prolora("demo", "--help")[1]
    code, _, text = prolora("demo", "--method", "probe", "-o", tmp_path / "out")
    assert code == 2 and "--method" in text and "'auto', 'prolora'" in text
    assert not (tmp_path / "out").exists()


def test_an_unknown_lora_or_target_is_refused_with_the_choices(tmp_path):
    with pytest.raises(ProLoRAError, match=r"--lora none.*slanted, thick"):
        demo.run_demo(tmp_path, lora="none")
    with pytest.raises(ProLoRAError, match=r"--target none.*choose from finetuned, pruned$"):
        demo.run_demo(tmp_path, target="none")
