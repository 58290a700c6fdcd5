"""Every kind of LoRA becomes a plain one in every format, and the residual that is told is true."""

import re
from types import SimpleNamespace

import pytest
import torch
from diagonal import keep_some, pair_up
from hypothesis import given
from hypothesis import strategies as st
from lora_files import LINEAR, factors, read_header, read_lora
from safetensors.torch import load_file, save_file

import prolora
from prolora import LowRank

LEFT_OUT = "left out as asked: its block has the factor 0"
FORMATS = ["kohya", "diffusers", "peft", "comfy"]
KOHYA = {f"lora_unet_{name.replace('.', '_')}": name for name in LINEAR}


def make_base():
    generator = torch.Generator().manual_seed(3)
    return {f"{n}.weight": torch.randn(s, generator=generator) for n, s in LINEAR.items()}


def make_lora(kind, rank, seed):
    """(tensors in LyCORIS' keys, {module: dense update} by its formulas in float64)."""
    tensors, dense = {}, {}
    base = make_base()
    for i, (key, name) in enumerate(KOHYA.items()):
        out, inputs = LINEAR[name]
        up, down = factors((out, inputs), rank, seed + i)
        alpha = 2.0
        scale = alpha / rank
        if kind in ("lora", "dora"):
            tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
            delta = up.double() @ down.double() * scale
        if kind == "dora":
            weight = base[f"{name}.weight"].double()
            magnitude = 1 + torch.rand(out, 1, generator=torch.Generator().manual_seed(i))
            tensors[f"{key}.dora_scale"] = magnitude
            merged = weight + delta
            delta = merged / merged.norm(dim=1, keepdim=True) * magnitude.double() - weight
        if kind == "loha":
            up2, down2 = factors((out, inputs), rank, seed + i + 50)
            names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
            parts = (up, down, up2, down2)
            tensors |= {f"{key}.{n}": x for n, x in zip(names, parts, strict=True)}
            delta = (up.double() @ down.double()) * (up2.double() @ down2.double()) * scale
        if kind == "lokr":
            small = torch.randn(2, 2, generator=torch.Generator().manual_seed(seed + i))
            up, down = factors((out // 2, inputs // 2), rank, seed + i)
            tensors |= {f"{key}.lokr_w1": small, f"{key}.lokr_w2_a": up, f"{key}.lokr_w2_b": down}
            delta = torch.kron(small.double(), up.double() @ down.double()) * scale
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
        dense[name] = delta
    return tensors, dense


def residual(adapter, dense):
    """√(Σ‖written − wanted‖² / Σ‖wanted‖²), dense and in float64."""
    lost = kept = 0.0
    for name, wanted in dense.items():
        update = adapter.updates[name]
        lost += float((update.up.double() @ update.down.double() - wanted).norm() ** 2)
        kept += float(wanted.norm() ** 2)
    return (lost / kept) ** 0.5


def told(report):
    return max(0.0, 1 - report.share_held) ** 0.5


@given(
    kind=st.sampled_from(["lora", "dora", "loha", "lokr"]),
    format=st.sampled_from(FORMATS),
    rank=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_every_kind_goes_round_every_format(kind, format, rank, seed):
    tensors, dense = make_lora(kind, rank, seed)
    base = make_base() if kind == "dora" else None
    done = prolora.convert(tensors, base, format=format, dtype="float32")
    written = done.state_dict(format, dtype="float32")
    back = prolora.convert(written, make_base()).adapter
    assert set(back.updates) == set(LINEAR)
    assert residual(back, dense) < 1e-5
    assert told(done.report) < 1e-5
    again = prolora.convert(written, format="kohya", dtype="float32")
    assert residual(again.adapter, dense) < 1e-5


@pytest.mark.parametrize("dtype", keep_some(["float32", "float16", "bfloat16"], "float16"))
@pytest.mark.parametrize(
    ("kind", "out_rank"), pair_up(["lora", "dora", "loha", "lokr"], [1, 2, 0.8, "50%"])
)
def test_the_residual_that_is_told_is_the_dense_one(kind, out_rank, dtype, tmp_path):
    tensors, dense = make_lora(kind, 4, 7)
    lora, base, out = (tmp_path / f"{n}.safetensors" for n in ("lora", "base", "out"))
    save_file(tensors, lora)
    save_file(make_base(), base)
    base = base if kind == "dora" else None
    report = prolora.convert(lora, base, out=out, out_rank=out_rank, dtype=dtype).report
    true = residual(read_lora(out), dense)
    assert true > 0.01  # something was cut
    assert told(report) == pytest.approx(true, rel=2e-3)
    assert f"differs from it by {100 * told(report):.3g}%" in report.in_words().headline


@pytest.mark.parametrize("kind", ["lokr", "short lokr", "loha", "narrow loha", "dora"])
def test_a_rank_is_cut_from_the_kinds_own_factors_and_keeps_what_a_dense_svd_keeps(kind):
    weight, up, down, other = (
        torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))
        for shape in ((640, 600), (640, 20), (20, 600), (640, 15))
    )
    if "lokr" in kind:  # the second factor is wider than what is ever kept, or can be squared
        m, n, step = (320, 300, 2) if kind == "lokr" else (64, 40, 10)
        small = down[:step, : 600 // n]
        parts = {"lokr_w1": small, "lokr_w2": weight[:m, :n] + up[:m] @ down[:, :n]}
        dense = torch.kron(*(x.double() for x in parts.values()))
    elif "loha" in kind:
        k = 15 if kind == "loha" else 6
        halves = (up[:, :k], down[:k] * torch.logspace(0, -3, k)[:, None], other[:, :k], down[:k])
        a, b, c, d = (half.double() for half in halves)
        dense = (a @ b) * (c @ d)
        parts = {f"hada_w{i // 2 + 1}_{'ab'[i % 2]}": x for i, x in enumerate(halves)}
    else:
        norms = weight.norm(dim=1, keepdim=True)
        dense = weight.double() + up.double() @ down.double()
        parts = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": norms}
        dense = dense / dense.norm(dim=1, keepdim=True) * norms.double() - weight.double()
    name = "blocks.0.attn"
    lora = {f"lora_unet_blocks_0_attn.{role}": x for role, x in parts.items()}
    done = prolora.convert(lora, {f"{name}.weight": weight}, out_rank=8, dtype="float32")
    energies = torch.linalg.svdvals(dense).square()
    best, (row,) = float(energies[:8].sum() / energies.sum()), done.report.modules
    lost = (done.adapter.updates[name].dense().double() - dense).square().sum()
    assert row.rank_out == 8 and 1 - row.rank_cut_energy == pytest.approx(best, rel=1e-4)
    assert row.rank_cut_energy == pytest.approx(float(lost / energies.sum()), rel=1e-4)


def test_what_needs_its_base_is_refused_without_it_in_plain_words():
    tensors, _ = make_lora("dora", 2, 0)
    words = "give the base model that it was trained on"
    with pytest.raises(prolora.errors.UnsupportedFormat, match=words):
        prolora.convert(tensors)


def test_a_base_that_is_not_the_loras_is_refused():
    tensors, _ = make_lora("lora", 2, 0)
    other = {n: w for n, w in make_base().items() if "mid_block" not in n}
    with pytest.raises(
        prolora.errors.UnsupportedFormat, match=r"1 of 6 .* do not exist in the base state"
    ):
        prolora.convert(tensors, other)


def test_updates_that_cannot_be_read_stay_behind_by_name():
    tensors, _ = make_lora("lora", 2, 0)
    key = next(iter(KOHYA))
    tensors[f"{key}.lora_gate"] = torch.ones(2)
    report = prolora.convert(tensors).report
    assert report.unread == (KOHYA[key],) and len(report.rows("refused")) == 1
    assert report.coverage == pytest.approx(1 - 1 / len(LINEAR))


def test_biases_are_kept_or_left_out_by_their_block():
    tensors, _ = make_lora("lora", 2, 0)
    tensors |= {f"{key}.diff_b": torch.full((LINEAR[n][0],), 2.0) for key, n in KOHYA.items()}
    first, *rest = (f"{name}.bias" for name in LINEAR)
    whole = prolora.convert(tensors)
    assert list(whole.adapter.vectors) == [first, *rest] and not whole.report.left_out
    part = prolora.convert(tensors, blocks={first.removesuffix(".bias"): 0.0})
    assert list(part.adapter.vectors) == rest and part.report.left_out == {first: LEFT_OUT}
    assert part.report.vectors == len(rest)
    alone = prolora.convert({key: x for key, x in tensors.items() if key.endswith("diff_b")})
    assert list(alone.adapter.vectors) == [first, *rest] and not alone.report.advice


def test_the_header_is_kept_and_inputs_are_not_overwritten(tmp_path):
    tensors, _ = make_lora("lora", 2, 0)
    lora = tmp_path / "lora.safetensors"
    save_file(tensors, lora, {"ss_output_name": "mine", "modelspec.trigger_phrase": "zzz"})
    prolora.convert(lora, out=tmp_path / "out.safetensors", dtype="float16")

    header = read_header(tmp_path / "out.safetensors")
    assert header["ss_output_name"] == "mine" and header["modelspec.trigger_phrase"] == "zzz"
    with pytest.raises(prolora.errors.OutputError):
        prolora.convert(lora, out=lora)
    assert set(load_file(lora)) == set(tensors)


def test_a_result_is_written_as_it_was_asked_for(tmp_path):
    came, _ = make_lora("lora", 2, 0)
    tensors = prolora.convert(came, format="diffusers").state_dict()
    done = prolora.convert(tensors, format="kohya", dtype="float16")
    for made in (done, prolora.merge([tensors, tensors], format="kohya", dtype="float16")):
        made.save(tmp_path / "out.safetensors", overwrite=True)
        written = load_file(tmp_path / "out.safetensors")
        assert all(key.startswith("lora_unet_") for key in written)
        assert {x.dtype for x in written.values()} == {torch.float16}
        assert made.state_dict().keys() == written.keys()
    # What is asked of `save` counts more.
    out = tmp_path / "out.safetensors"
    done.save(out, format="diffusers", dtype="float32", overwrite=True)
    written = load_file(out)
    assert not any(key.startswith("lora_unet_") for key in written)
    assert {x.dtype for x in written.values()} == {torch.float32}


def test_what_reading_cut_off_counts_in_energy_and_loss():
    update = LowRank(torch.diag(torch.tensor([2.0, 1])), torch.eye(2))
    adapter = prolora.Adapter({"mid_block.x": update}, kept_energy={"mid_block.x": 0.5})
    (row,) = prolora.convert(adapter, out_rank=1, dtype="float32").report.modules
    assert row.energy == pytest.approx(10)  # 5 that were read, of twice as much
    assert row.rank_cut_energy == pytest.approx(0.5 + 0.5 / 5)


@pytest.mark.parametrize(("kind", "came"), pair_up(["dora", "loha", "lora"], [None, 0.0, 3.0]))
def test_an_alpha_that_is_lost_or_wrong_is_set(kind, came, tmp_path):
    right, _ = make_lora(kind, 2, 0)
    right = {k: torch.tensor(5.0) if k.endswith("alpha") else x for k, x in right.items()}
    wrong = {k: x for k, x in right.items() if not k.endswith("alpha")}
    if came is not None:
        wrong |= {k: torch.tensor(came) for k in right.keys() - wrong.keys()}
    save_file(wrong, tmp_path / "wrong.safetensors")
    base = make_base() if kind == "dora" else None
    wanted = prolora.convert(right, base).adapter
    done = prolora.convert(tmp_path / "wrong.safetensors", base, alpha=5)
    for name, update in wanted.updates.items():
        assert torch.equal(done.adapter.updates[name].dense(), update.dense())
    if came == 3 and kind == "lora":
        told = done.report.in_words()
        assert "of wrong with alpha 5" in told.headline and "It acts 1.67 times" in str(told)
        row = done.report.modules[0]
        assert (row.norm_ratio, row.copy_distance) == pytest.approx((5 / 3, 2 / 3), rel=1e-5)
        assert row.energy == pytest.approx(9 / 25 * float(wanted.updates[row.source].norm()) ** 2)


def test_an_alpha_is_refused_where_something_else_tells_it():
    tensors, _ = make_lora("lora", 2, 0)
    with pytest.raises(prolora.errors.InvalidOption, match="updates in memory"):
        prolora.convert(read_lora(tensors), alpha=1)
    peft = prolora.convert(tensors, format="peft")
    config = SimpleNamespace(to_dict=peft.peft_config)
    with pytest.raises(prolora.errors.InvalidOption, match="`lora_alpha` in its PEFT"):
        prolora.convert((peft.state_dict("peft"), config), alpha=1)
    for alpha in (0, -1, float("nan"), True, 1e-60, 1e400):
        with pytest.raises(prolora.errors.InvalidOption, match="a number from"):
            prolora.convert(tensors, alpha=alpha)


def test_the_rank_that_keeps_enough_is_told_and_keeps_it():
    tensors, _ = make_lora("lora", 4, 7)
    words = prolora.convert(tensors, out_rank=1).report.in_words()
    (line,) = words.lines
    told = re.fullmatch(r"Rank (\d) would keep 95% .*", line)
    assert words.mark == "⚠" and told
    rank = int(told[1])
    kept = [prolora.convert(tensors, out_rank=r).report.share_held for r in (rank - 1, rank)]
    assert kept[0] < 0.95 <= kept[1]
    # Rounding and what cannot be read are no matter of rank.
    assert not prolora.convert(tensors).report.in_words().lines
