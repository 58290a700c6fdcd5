"""Maps between two models in bench/quality: they find what corresponds, and the script runs."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

QUALITY = Path(__file__).parents[1] / "bench/quality"
pytest.importorskip("PIL", reason="Pillow, which reads the sheet of icons, is missing")
pytest.importorskip("diffusers", reason="diffusers, whose models the study trains, is missing")


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch):
    """The study's modules are imported anew, and leave nothing behind."""
    monkeypatch.syspath_prepend(str(QUALITY))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(QUALITY)):
            del sys.modules[name]


def make_pair(target_kind="source", permuted=False):
    """An untrained source, and as target the same with its hidden units in another order."""
    from icons.networks import Painter
    from icons_world import WORLD
    from pair_maps_fitting import Pair

    from prolora import LowRank

    models = []
    for kind in ("source", target_kind):
        torch.manual_seed(0)
        models.append(Painter("flux", kind).eval().requires_grad_(False))
    if permuted:
        order = torch.randperm(384)
        for block in models[1].backbone.single_transformer_blocks:
            block.proj_mlp.weight.data = block.proj_mlp.weight[order]
            block.proj_mlp.bias.data = block.proj_mlp.bias[order]
            block.proj_out.weight.data[:, 96:] = block.proj_out.weight[:, 96:][:, order]
    pair = Pair.__new__(Pair)
    pair.kind, pair.seed, pair.adapter, pair.world = target_kind, 1, "neon", WORLD
    pair.case = SimpleNamespace(source=models[0], target=models[1], lora={}, score=lambda _: 0.5)
    for name in pair.names()[0]:
        if name.startswith("single"):
            m, n = models[0].backbone.get_submodule(name).weight.shape
            pair.case.lora[name] = LowRank(0.1 * torch.randn(m, 2), torch.randn(2, n))
    return pair


@pytest.mark.slow
def test_a_lora_moves_to_the_same_model_with_its_hidden_units_in_another_order():
    from pair_maps_fitting import BEST, WAYS, Study
    from pair_maps_scoring import Judged

    pair = make_pair(permuted=True)
    study = Study.collect(pair, images=8, times=12)
    moved = study.fit(*WAYS[BEST]).move(pair.case.lora)
    judged = Judged.of(pair, 8)
    wanted = judged.wanted(pair.case.lora)

    def missed(updates):
        return float((judged.changed(updates) - wanted).square().sum() / wanted.square().sum())

    assert missed(pair.case.lora) > 0.3, "a copy would do as well"
    assert missed(moved) < 0.1


def test_every_block_of_the_source_sends_to_the_block_of_its_depth():
    from pair_maps_fitting import match_groups

    pair = make_pair("resized")
    matched = match_groups(*pair.names())
    there = [matched[f"single_transformer_blocks.{i}.proj_out"] for i in range(4)]
    assert [name.split(".")[1] for name in there] == ["0", "1", "1", "2"]
    assert matched["transformer_blocks.1.reads"] == "transformer_blocks.1.reads"


@pytest.mark.slow
def test_the_script_writes_a_row_for_every_lora_and_way(monkeypatch, tmp_path):
    import pair_maps

    pair = make_pair("resized")
    monkeypatch.setattr(pair_maps, "Pair", lambda *_: pair)
    asked = {"adapters": ["neon"], "images": 4, "times": 24, "fitted": []}
    asked["concept"] = False
    asked["ways"] = [pair_maps.BEST, "slopes, rotation"]
    pair_maps.try_maps("resized", 1, {}, asked, tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {*asked["ways"], f"{pair_maps.BEST}; parts"} <= {row["way"] for row in rows}
    results = pair_maps.collect(tmp_path)
    assert "resized, seed 1" in pair_maps.tables_of(results)["maps cost"]
