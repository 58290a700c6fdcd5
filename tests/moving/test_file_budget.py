"""--out-rank 100MB: the file fits, and its columns are those of most energy per byte."""

import re
from dataclasses import replace

import pytest
import torch
from diagonal import pair_up
from hypothesis import given
from hypothesis import strategies as st
from mini import lora_tensors, source_weights, target_weights, write_case

import prolora
from prolora import LowRank, adapters
from prolora.adapters import Adapter, fused_updates, group_modules
from prolora.architectures.families import known_families
from prolora.errors import OutputError
from prolora.files.safetensors_file import SafetensorsFile
from prolora.moving.file_budget import OutputForm, describe_cuts
from prolora.moving.transfer_report import TransferReport
from prolora.reports.module_report import ModuleReport

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
UNET = {
    f"{BLOCK}.attn1.to_q": (16, 16),
    f"{BLOCK}.attn2.to_k": (16, 40),
    f"{BLOCK}.ff.net.0.proj": (64, 16),
    "down_blocks.1.resnets.0.conv1": (16, 8, 3, 3),
    "down_blocks.1.resnets.0.conv_shortcut": (16, 8, 1, 1),
}
TEXT = {
    f"text_encoder.text_model.encoder.layers.0.{module}": (24, 24)
    for module in ("self_attn.q_proj", "self_attn.out_proj")
}
FLUX = {
    "transformer_blocks.0.attn.to_q": (12, 12),
    "transformer_blocks.0.attn.to_k": (12, 12),
    "transformer_blocks.0.attn.to_v": (12, 12),
    "transformer_blocks.0.ff.net.2": (12, 48),
    "single_transformer_blocks.0.attn.to_q": (12, 12),
    "single_transformer_blocks.0.proj_mlp": (48, 12),
    "norm_out.linear": (24, 12),
}


def adapter_of(shapes, ranks, scales=(1.0,), **fields):
    """Random updates whose singular values fall; ranks and scales are cycled through."""
    generator = torch.Generator().manual_seed(0)
    updates, kernels = {}, {}
    for i, (name, (m, n, *kernel)) in enumerate(shapes.items()):
        rank, scale = ranks[i % len(ranks)], scales[i % len(scales)]
        n *= torch.Size(kernel).numel()
        fall = scale * 0.7 ** torch.arange(rank)
        updates[name] = LowRank(
            torch.randn(m, rank, generator=generator) * fall,
            torch.randn(rank, n, generator=generator),
        )
        if kernel:
            kernels[name] = tuple(kernel)
    return Adapter(updates, kernels, **fields)


def rows_of(adapter):
    return [
        ModuleReport(name, name, "mapped", "copied", update.shape, update.rank, update.rank, 1.0)
        for name, update in adapter.updates.items()
    ]


def with_rank_one(adapter):
    return adapter.with_updates({n: u.truncate(rank=1) for n, u in adapter.updates.items()})


def halfway(adapter, **written):
    """A size between the least and that of the whole."""
    sizes = [adapters.adapter_file_size(x, **written) for x in (with_rank_one(adapter), adapter)]
    return sum(sizes) // 2


def size_on_disk(adapter, path, **written):
    adapters.write_adapter(adapter, path, **written)
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


@pytest.mark.parametrize(
    ("ranks", "dtype"), pair_up([(12,), (12, 5, 9)], [torch.float16, torch.float32])
)
@pytest.mark.parametrize(
    ("format", "spelling", "shapes"),
    [
        ("kohya", "sgm", UNET | TEXT),
        ("diffusers", "diffusers", UNET | TEXT),
        ("comfy", "diffusers", UNET | TEXT),
        ("peft", "diffusers", UNET),
        ("kohya", "sgm", FLUX),
        ("comfy", "sgm", FLUX),
        ("diffusers", "diffusers", FLUX),
    ],
)
def test_the_file_is_as_large_as_it_may_be_and_no_larger(
    tmp_path, format, spelling, shapes, ranks, dtype
):
    vectors = {} if format == "peft" else {f"{next(iter(shapes))}.bias": torch.ones(12)}
    adapter = adapter_of(shapes, ranks, (1, 3, 0.2), spelling=spelling, vectors=vectors)
    written = {"format": format, "dtype": dtype}
    limit = halfway(adapter, **written)
    smaller = OutputForm(**written, limit=limit).fit(adapter)
    size = size_on_disk(smaller, tmp_path / "out", **written)
    assert size == adapters.adapter_file_size(smaller, **written)
    column = max(sum(group.shape) for group in group_modules(adapter, format)) * dtype.itemsize
    # Another column would not fit, with what it adds to the header.
    assert limit - column - 300 < size <= limit


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=5),
    st.lists(st.sampled_from([0.0, 1e-3, 0.3, 1.0, 5.0]), min_size=1, max_size=5),
    st.sampled_from(["kohya", "diffusers", "peft"]),
    st.floats(0, 1.1),
)
def test_no_column_left_out_has_more_energy_per_byte_than_one_that_is_kept(
    ranks, scales, format, share
):
    adapter = adapter_of(UNET, ranks, scales)
    written = {"format": format, "dtype": torch.float16}
    low, high = (
        adapters.adapter_file_size(x, **written) for x in (with_rank_one(adapter), adapter)
    )
    limit = int(low + share * (high - low))
    smaller = OutputForm(**written, limit=limit).fit(adapter)
    assert adapters.adapter_file_size(smaller, **written) <= limit
    kept, left_out = [], []
    for name, update in adapter.updates.items():
        per_byte = torch.linalg.svdvals(update.dense().double()).square() / sum(update.shape)
        rank = smaller.updates[name].rank
        assert 1 <= rank <= update.rank
        kept += per_byte[1:rank].tolist()
        left_out += per_byte[rank : update.rank].tolist()
        closest = per_byte[:rank].sum() * sum(update.shape)
        torch.testing.assert_close(smaller.updates[name].norm() ** 2, closest, rtol=1e-4, atol=1e-8)
    if kept and left_out:
        assert min(kept) >= max(left_out) * (1 - 1e-5) - 1e-9


def test_a_fused_weight_of_flux_is_cut_as_the_one_matrix_that_the_file_holds(tmp_path):
    adapter = adapter_of(FLUX, (6,), spelling="sgm")
    written = {"format": "kohya", "dtype": torch.float32}
    smaller = OutputForm(**written, limit=halfway(adapter, **written)).fit(adapter)
    adapters.write_adapter(smaller, tmp_path / "out", **written)
    back = adapters.read_adapter(tmp_path / "out")
    groups = {group.path: group for group in group_modules(adapter, "kohya")}
    assert any(len(group.parts) == 3 for group in groups.values())
    for cut in group_modules(smaller, "kohya"):
        whole = groups[cut.path].update().dense()
        file = SafetensorsFile(tmp_path / "out").tensors[f"{cut.path}.lora_down.weight"]
        assert file.shape[0] == cut.rank <= groups[cut.path].rank
        assert cut.rank < groups[cut.path].rank or len(cut.parts) == 1
        s = torch.linalg.svdvals(whole.double())
        away = (cut.update().dense() - whole).norm().double()
        torch.testing.assert_close(away, s[cut.rank :].norm(), rtol=1e-4, atol=1e-5)
    for name, update in smaller.updates.items():
        torch.testing.assert_close(back.updates[name].dense(), update.dense())


def test_what_fits_is_left_as_it_is():
    adapter = adapter_of(UNET, (4, 2))
    rows = rows_of(adapter)
    limit = adapters.adapter_file_size(adapter)
    assert OutputForm(limit=limit).fit(adapter) is adapter
    assert list(describe_cuts(rows, adapter, adapter)) == rows
    assert OutputForm(limit=limit - 1).fit(adapter) is not adapter


def test_the_report_says_what_each_module_lost():
    adapter = adapter_of(UNET, (8,), (1, 0.1))
    limit = halfway(adapter)
    smaller = OutputForm(limit=limit).fit(adapter)
    report = TransferReport(
        **{"method": "copy", "rank_rule": 0.9, "threshold": 0.8, "match": "name"},
        **{"source": "source", "target": "target"},
        modules=describe_cuts(rows_of(adapter), adapter, smaller),
        file_limit=limit,
    )
    smaller = smaller
    for row in report.modules:
        whole, cut = adapter.updates[row.source], smaller.updates[row.source]
        assert row.rank_out == cut.rank
        assert row.norm_ratio == pytest.approx(float(cut.norm() / whole.norm()), rel=1e-5)
        assert row.rank_cut_energy == pytest.approx(1 - row.norm_ratio**2, abs=1e-6)
    ranks = [row.rank_out for row in report.modules]
    assert len(set(ranks)) > 1
    said = next(text for text in report.sentences() if text.startswith("Cut to fit"))
    assert f"ranks {min(ranks)} to {max(ranks)}" in said and "% of the energy" in said


def test_modules_that_are_carried_over_take_part():
    tensors = lora_tensors()
    generator = torch.Generator().manual_seed(1)
    key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors[f"{key}.lora_up.weight"] = torch.randn(24, 4, generator=generator) * 1e-3
    tensors[f"{key}.lora_down.weight"] = torch.randn(4, 24, generator=generator)
    options = {"method": "copy", "dtype": torch.float16}
    whole = prolora.transfer(tensors, source_weights(), target_weights(), **options).adapter
    limit = halfway(whole, dtype=torch.float16)
    done = prolora.transfer(
        tensors, source_weights(), target_weights(), out_rank=f"{limit}B", **options
    )
    (row,) = [row for row in done.report.modules if row.source.startswith("text_encoder")]
    assert row.rank_in == 4 and row.rank_out == done.adapter.updates[row.source].rank == 1
    assert row.rank_cut_energy > 0.1


def test_a_size_below_one_column_a_module_is_refused_before_a_weight_is_read(monkeypatch):
    read = prolora.Base.read
    monkeypatch.setattr(prolora.Base, "read", lambda *a: pytest.fail("a weight was read"))
    options = {"method": "copy", "format": "diffusers"}
    with pytest.raises(OutputError, match="100 bytes are too few") as refused:
        prolora.transfer(
            lora_tensors(), source_weights(), target_weights(), out_rank="100B", **options
        )
    least = re.search(r"takes (\d+kB)", str(refused.value))[1]
    monkeypatch.setattr(prolora.Base, "read", read)
    done = prolora.transfer(
        lora_tensors(), source_weights(), target_weights(), out_rank=least, **options
    )
    assert min(row.rank_out for row in done.report.rows("mapped")) == 1


def test_a_size_that_only_the_header_exceeds_is_refused_at_the_end():
    adapter = replace(adapter_of(UNET, (4,)), metadata={"ss_tag_frequency": "x" * 3000})
    limit = adapters.adapter_file_size(with_rank_one(adapter))
    assert OutputForm(limit=limit).fit(adapter)
    with pytest.raises(OutputError, match=f"takes {-(-limit // 1000)}kB"):
        OutputForm(limit=limit - 1).fit(adapter)


def test_biases_alone_cannot_be_cut():
    adapter = Adapter({}, vectors={f"{BLOCK}.ff.net.0.proj.bias": torch.ones(64)})
    limit = adapters.adapter_file_size(adapter)
    assert OutputForm(limit=limit).fit(adapter) is adapter
    with pytest.raises(OutputError, match="too few"):
        OutputForm(limit=limit - 1).check(adapter)
    with pytest.raises(OutputError, match="too few"):
        OutputForm(limit=limit - 1).fit(adapter)


@pytest.mark.parametrize("method", ["copy", "prolora"])
def test_files_fit_alone_and_together_and_are_not_those_of_another_size(tmp_path, method):
    lora, source, target = write_case(tmp_path)
    options = {"method": method, "threshold": 0, "dtype": torch.float16, "format": "diffusers"}
    alone = tmp_path / "alone.safetensors"
    prolora.transfer(lora, source, target, out=alone, out_rank="5900B", **options)
    assert 5000 < alone.stat().st_size <= 5900

    def moved(size):
        (outcome,) = prolora.transfer_many(
            [lora], source, target, tmp_path / "moved", out_rank=size, **options
        )
        return outcome

    first = moved("5900B")
    assert first.status == "moved" and 5000 < first.out.stat().st_size <= 5900
    assert first.report.file_limit == 5900
    assert [moved(size).status for size in ("5900B", "5800B")] == ["already there", "failed"]


def test_rows_that_a_part_does_not_use_do_not_widen_a_fused_weight():
    matrix = known_families()["flux"].find_weight("double_blocks.0.img_attn.qkv")
    up = torch.randn(36, 4)
    up[:12, 2:] = 0
    whole = LowRank(up, torch.randn(4, 12))
    parts = fused_updates.unfuse_update(matrix, whole, matrix.parts)
    assert fused_updates.fused_rank(matrix, parts) == 4
    again = fused_updates.fuse_updates(matrix, parts)
    assert torch.equal(again.up, whole.up) and torch.equal(again.down, whole.down)
