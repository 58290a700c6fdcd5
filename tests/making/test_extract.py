"""A LoRA that was merged into a base comes out again, and what is lost of one is told."""

import copy

import pytest
import torch
from checkpoints import name_in_ldm
from hypothesis import given
from hypothesis import strategies as st
from lora_files import CONV, LINEAR, adapter_of, empty_base, read_lora
from safetensors.torch import load_file, save_file
from small_models import authors_weights, small_weights

import prolora
from prolora.bases import identity

SHAPES = {**LINEAR, **CONV}
NORM = "down_blocks.1.resnets.0.norm1"
FORMATS = ["kohya", "diffusers", "peft", "comfy"]


def make_base(seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = {f"{n}.weight": torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    base |= {f"{n}.bias": torch.zeros(s[0]) for n, s in SHAPES.items()}
    return base | {f"{NORM}.weight": torch.ones(8), f"{NORM}.bias": torch.zeros(8)}


def merge(base, updates):
    """The base with updates added in float64, as torch stores it in float32."""
    tuned = dict(base)
    for name, update in updates.items():
        delta = update.up.double() @ update.down.double()
        weight = base[f"{name}.weight"]
        tuned[f"{name}.weight"] = (weight.double() + delta.reshape(weight.shape)).float()
    return tuned


def distance(got, wanted):
    """‖got − wanted‖ ÷ ‖wanted‖, dense and in float64."""
    ours, theirs = (x.up.double() @ x.down.double() for x in (got, wanted))
    return float((ours - theirs).norm() / theirs.norm())


@given(seed=st.integers(0, 99), rank=st.integers(1, 8), format=st.sampled_from(FORMATS))
def test_a_merged_lora_comes_out_at_its_rank(seed, rank, format):
    base, lora = make_base(seed), adapter_of(SHAPES, rank=rank)
    how = {"out_rank": rank, "dtype": "float32", "format": format}
    done = prolora.extract(base, merge(base, lora.updates), **how)
    assert list(done.adapter.updates) == list(SHAPES)
    config = done.peft_config() if format == "peft" else None
    back = prolora.convert(done.state_dict(format), base).adapter
    assert config is None or config["r"]
    for name, update in lora.updates.items():
        size = min(rank, *update.shape)
        assert done.adapter.updates[name].rank == size
        assert distance(done.adapter.updates[name], update) < 1e-5
        assert distance(back.updates[name], update) < 1e-5
    assert done.report.share_held == pytest.approx(1, abs=1e-9)


@given(rank=st.integers(1, 16), seed=st.integers(0, 20))
def test_the_share_of_energy_that_is_told_is_the_dense_one(rank, seed):
    base, tuned = make_base(seed), make_base(seed + 100)
    report = prolora.extract(base, tuned, out_rank=rank, dtype="float32").report
    for row in report.rows("mapped"):
        key = f"{row.source}.weight"
        values = torch.linalg.svdvals((tuned[key].double() - base[key].double()).flatten(1)) ** 2
        kept = float(values[:rank].sum() / values.sum())
        assert 1 - row.rank_cut_energy == pytest.approx(kept, abs=1e-6)
        assert row.energy == pytest.approx(float(values.sum()), rel=1e-6)
    assert f"{report.share_held:.2%}" in report.in_words().headline


@pytest.mark.parametrize(("dtype", "scale"), [("float16", 1e-5), ("bfloat16", 1), ("float16", 1)])
def test_what_rounding_leaves_of_the_lora_is_measured_and_told(dtype, scale):
    base, tuned = make_base(), make_base(1)
    tuned = {key: base[key] + scale * x for key, x in tuned.items()}
    given = base, tuned
    exact = prolora.extract(*given, out_rank=4, dtype="float32").adapter.updates
    done = prolora.extract(*given, out_rank=4, dtype=dtype)
    written = read_lora(done.state_dict("kohya")).updates
    pairs = [(written[n].dense().double(), exact[n].dense().double()) for n in exact]
    energy = sum(float(x.square().sum()) for _, x in pairs)
    left = sum(float((q * x).sum()) for q, x in pairs) / energy
    error = (sum(float((q - x).square().sum()) for q, x in pairs) / energy) ** 0.5
    told = done.report.rounding
    assert told.survived == pytest.approx(left, abs=1e-6)
    assert told.error == pytest.approx(error, rel=1e-3) and error > 1e-5
    assert f"Rounding leaves {left:.2%} of that" in done.report.in_words().lines[1]


def test_rounding_below_double_precision_counts_as_none():
    """Of up = (2, 1.4175 · 2⁻²⁶) in bfloat16: Σ squares less twice the product is -1 ulp."""
    base = {f"{n}.weight": torch.zeros(2, 1) for n in LINEAR}
    tuned = {key: torch.tensor([[4.0], [2 * 1.4175 * 2.0**-26]]) for key in base}
    done = prolora.extract(base, tuned, out_rank=1, dtype="bfloat16")
    assert all(x.up[0].abs() == 2 == x.down[0].abs() for x in done.adapter.updates.values())
    told = done.report.rounding
    assert (told.survived, told.error) == (pytest.approx(1), 0)
    assert "Rounding leaves 100.00%" in done.report.in_words().lines[1]


def test_a_share_of_energy_takes_the_fewest_columns():
    base, tuned = make_base(), make_base(1)
    for row in prolora.extract(base, tuned, out_rank=0.7).report.rows("mapped"):
        key = f"{row.source}.weight"
        values = torch.linalg.svdvals((tuned[key].double() - base[key].double()).flatten(1)) ** 2
        share = values.cumsum(0) / values.sum()
        assert share[row.rank_out - 1] >= 0.7 - 1e-6
        assert row.rank_out == 1 or share[row.rank_out - 2] < 0.7 + 1e-6


def test_biases_and_norms_are_differences_where_the_format_holds_them():
    base = make_base()
    tuned = merge(base, adapter_of(LINEAR, rank=2).updates)
    bias = "mid_block.attentions.0.proj_in.bias"
    tuned[bias], tuned[f"{NORM}.weight"] = base[bias] + 0.5, base[f"{NORM}.weight"] * 1.5
    done = prolora.extract(base, tuned, out_rank=2, format="kohya")
    assert set(done.adapter.vectors) == {bias, f"{NORM}.weight"}
    assert torch.allclose(done.adapter.vectors[f"{NORM}.weight"], torch.full((8,), 0.5))
    keys = done.state_dict("kohya")
    for ending in ("proj_in.diff_b", "w_norm"):
        assert any(key.endswith(ending) for key in keys)
    done = prolora.extract(base, tuned, out_rank=2, format="diffusers")
    assert set(done.adapter.vectors) == {bias}
    reason = done.report.left_out[f"{NORM}.weight"]
    assert "no key" in reason and "1.41" in reason
    tuned["conv_in.bias"] = torch.ones(3)
    left = prolora.extract(base, tuned, out_rank=2).report.left_out
    assert "only" in left["conv_in.bias"]


def test_comfyuis_formula_on_the_file_makes_the_tuned_base(tmp_path):
    """W + up·down·α/r, b + diff_b and w + w_norm, written down from its loader."""
    base = make_base()
    tuned = merge(base, adapter_of(SHAPES, rank=4).updates)
    tuned[f"{NORM}.weight"] = base[f"{NORM}.weight"] + 0.25
    bias = "mid_block.attentions.0.proj_in.bias"
    tuned[bias] = base[bias] - 0.75
    out = tmp_path / "x.safetensors"
    prolora.extract(base, tuned, out=out, out_rank=4, dtype="float32", format="kohya")
    file = load_file(out)
    spelt = [(x, n) for n in (*SHAPES, NORM) for x in (n, name_in_ldm(n)) if x]
    names = {f"lora_unet_{x.replace('.', '_')}": n for x, n in spelt}
    merged = copy.deepcopy(base)
    for key, tensor in file.items():
        module, _, role = key.partition(".")
        name = names[module]
        if role == "lora_up.weight":
            down, alpha = file[f"{module}.lora_down.weight"], file[f"{module}.alpha"]
            delta = tensor.flatten(1) @ down.flatten(1) * alpha / down.shape[0]
            merged[f"{name}.weight"] += delta.reshape(merged[f"{name}.weight"].shape)
        elif role == "diff_b":
            merged[f"{name}.bias"] += tensor
        elif role == "w_norm":
            merged[f"{name}.weight"] += tensor
    for key, tensor in tuned.items():
        assert torch.allclose(merged[key], tensor, atol=1e-5), key


@pytest.mark.parametrize("layout", ["flux1-dev", "wan-t2v-1.3b"])
def test_a_transformers_lora_comes_out_for_comfyui(layout, tmp_path):
    old, new = (
        {f"{n}.weight": w for n, w in small_weights(layout, drift=d).items()} for d in (0, 1)
    )
    for weights, size in ((old, 1.0), (new, 1.001)) if "wan" in layout else ():
        weights["scale_shift_table"] = torch.full((1, 2, 48), size)
        weights["blocks.0.scale_shift_table"] = torch.full((1, 6, 48), size)
    report = prolora.extract(old, new, out=tmp_path / "x.safetensors", out_rank=0.9).report
    assert report.coverage == 1 and report.share_held >= 0.9
    parameters = [row.reason for row in report.rows("skipped") if "scale_shift" in row.source]
    assert parameters == ["no LoRA's layer: a parameter"] * 2 * ("wan" in layout)
    read = prolora.convert(tmp_path / "x.safetensors", old).adapter
    for name, update in read.updates.items():
        dense = new[f"{name}.weight"] - old[f"{name}.weight"]
        assert (update.up @ update.down - dense).norm() < 0.33 * dense.norm(), name


def test_vectors_under_the_authors_names_are_split_swapped_and_named():
    """FLUX: biases of fused matrices, the halves of the last modulation, and norms."""
    weights = small_weights("flux1-dev")
    base = {f"{n}.weight": w for n, w in authors_weights("flux", weights).items()}
    tuned = {key: weight + 0.1 for key, weight in base.items()}
    for old, new in ((base, 0.0), (tuned, 1.0)):
        for name in ("double_blocks.0.img_attn.qkv", "final_layer.adaLN_modulation.1"):
            rows = len(old[f"{name}.weight"])
            old[f"{name}.bias"] = new * torch.arange(1.0, rows + 1)
        old["double_blocks.0.img_attn.norm.query_norm.scale"] = torch.full((4,), new)
    done = prolora.extract(base, tuned, out_rank=1, dtype="float32", format="comfy")
    (name,) = done.report.left_out
    assert name == "double_blocks.0.img_attn.norm.query_norm.scale"
    assert "norm of its difference is 2" in done.report.left_out[name]
    rows = torch.arange(1.0, 1 + len(base["double_blocks.0.img_attn.qkv.bias"]))
    for part, letter in zip(rows.chunk(3), "qkv", strict=True):
        found = done.adapter.vectors[f"transformer_blocks.0.attn.to_{letter}.bias"]
        assert torch.equal(found, part)
    rows = torch.arange(1.0, 1 + len(base["final_layer.adaLN_modulation.1.bias"]))
    assert torch.equal(done.adapter.vectors["norm_out.linear.bias"], torch.cat(rows.chunk(2)[::-1]))
    keys = done.state_dict("comfy")
    assert torch.equal(keys["diffusion_model.final_layer.adaLN_modulation.1.diff_b"], rows)


def test_biases_of_text_encoders_are_extracted_too():
    base, layer = make_base(), "text_encoder.text_model.encoder.layers.0"
    base |= {
        f"{layer}.mlp.fc1.weight": torch.randn(32, 16),
        f"{layer}.mlp.fc1.bias": torch.zeros(32),
    }
    base[f"{layer}.layer_norm1.weight"] = torch.ones(16)
    tuned = {key: tensor * 1.5 + 0.25 for key, tensor in base.items()}
    done = prolora.extract(base, tuned, out_rank=4, format="kohya")
    assert f"{layer}.mlp.fc1" in done.adapter.updates
    assert torch.equal(done.adapter.vectors[f"{layer}.mlp.fc1.bias"], torch.full((32,), 0.25))
    assert torch.equal(done.adapter.vectors[f"{layer}.layer_norm1.weight"], torch.full((16,), 0.75))
    assert not done.report.left_out
    done.state_dict("kohya")


def test_a_convolution_along_a_line_keeps_its_kernel():
    base, name = make_base(), "mid_block.attentions.0.line"
    base[f"{name}.weight"] = torch.zeros(8, 6, 3)
    tuned = {**base, f"{name}.weight": torch.randn(8, 6, 3)}
    done = prolora.extract(base, tuned, out_rank=2, dtype="float32")
    assert done.adapter.kernels == {name: (3,)}
    assert done.state_dict("diffusers")[f"unet.{name}.lora_A.weight"].shape == (2, 6, 3)


def test_a_bound_on_memory_counts_all_of_the_result():
    base, tuned = (empty_base("anima") for _ in range(2))
    report = prolora.extract(base, tuned, dry_run=True, out_rank=1024).report
    factors = sum(4 * row.rank_out * sum(row.shape) for row in report.rows("mapped"))
    assert factors > 2e9
    with pytest.raises(prolora.errors.TooLittleMemory):
        prolora.extract(base, tuned, dry_run=True, out_rank=1024, max_memory=0.7 * factors)
    prolora.extract(base, tuned, dry_run=True, out_rank=1024, max_memory=2 * factors)


def test_bases_of_other_shapes_are_refused_with_the_first_module():
    base, tuned = make_base(), make_base(1)
    first = next(iter(LINEAR))
    wider = tuned | {f"{first}.weight": torch.zeros(16, 17)}
    with pytest.raises(prolora.errors.ShapeMismatch, match=first):
        prolora.extract(base, wider)
    del wider[f"{first}.weight"]
    for pair in ((base, wider), (wider, base)):
        with pytest.raises(prolora.errors.ShapeMismatch, match=f"{first}.*has no such module"):
            prolora.extract(*pair)


def test_one_model_with_itself_is_refused_and_equal_weights_give_no_file(tmp_path):
    opened = prolora.open_base(make_base())
    with pytest.raises(prolora.errors.WrongBase, match="nothing to extract"):
        prolora.extract(opened, opened)
    key = f"{next(iter(LINEAR))}.weight"
    base, tuned = ({**make_base(), key: torch.full(SHAPES[key[:-7]], x)} for x in (1e-25, 2e-25))
    row = prolora.extract(base, tuned, dtype="float32").report.modules[0]
    assert (row.source, row.status) == (key[:-7], "skipped") and "less than 1e-20" in row.reason
    with pytest.raises(prolora.errors.OutputError, match="no module is left"):
        prolora.extract(make_base(), make_base(), out=tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", ["exact", "50%", 0, 1.5, "many"])
def test_a_rank_that_an_extraction_cannot_use_is_refused(rank):
    with pytest.raises(prolora.errors.InvalidOption, match="out_rank"):
        prolora.extract({}, {}, out_rank=rank)


def test_weights_that_are_not_finite_are_refused_by_name():
    tuned = make_base(1)
    first = next(iter(LINEAR))
    tuned[f"{first}.weight"][0, 0] = torch.nan
    with pytest.raises(prolora.errors.NonFiniteWeights, match=first):
        prolora.extract(make_base(), tuned)
    with pytest.raises(prolora.errors.NonFiniteWeights, match=first):
        prolora.extract(tuned, make_base())
    for value in (torch.nan, torch.inf):
        tuned = make_base(1)
        tuned[f"{first}.bias"][0] = value
        for bases in ((make_base(), tuned), (tuned, make_base())):
            with pytest.raises(prolora.errors.NonFiniteWeights, match=f"{first}.bias"):
                prolora.extract(*bases)


def test_large_weights_are_finite_though_their_squares_are_not():
    base, tuned = make_base(), make_base()
    first = next(iter(LINEAR))
    for weights, size in ((base, 1.0), (tuned, 1.01)):
        weights[f"{first}.weight"] = torch.ones(SHAPES[first], dtype=torch.float64) * 1e30 * size
    done = prolora.extract(base, tuned, out_rank=1, dtype="float32")
    assert done.adapter.updates[first].dense().mean() == pytest.approx(1e28, rel=1e-5)


def test_a_dry_run_reads_no_weight_and_names_every_module(monkeypatch):
    monkeypatch.setattr(prolora.Base, "read", lambda *x: pytest.fail("a weight was read"))
    report = prolora.extract(make_base(), make_base(1), out_rank=4, dry_run=True).report
    assert report.dry_run and len(report.rows("mapped")) == len(SHAPES)
    assert all(row.rank_out == min(*row.shape, 4) for row in report.rows("mapped"))


def test_an_extraction_replaces_no_input_and_leaves_nothing_where_it_is_stopped(tmp_path):
    def stop(done, total, name):
        if done:
            raise KeyboardInterrupt

    files = [tmp_path / name for name in ("old.safetensors", "new.safetensors")]
    for number, file in enumerate(files):
        save_file(make_base(number), file)
        file.chmod(0o444)
    for out in files:
        with pytest.raises(prolora.errors.OutputError):
            prolora.extract(*files, out=out, overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        prolora.extract(*files, out=tmp_path / "out.safetensors", progress=stop)
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_an_extracted_lora_is_for_its_base_and_moves_on(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_SHORT_START", 0)  # these files have less than a megabyte
    old, new, out = (tmp_path / f"{n}.safetensors" for n in ("old", "new", "x"))
    save_file(make_base(), old)
    save_file(make_base(1), new)
    prolora.extract(old, new, out=out, out_rank=4)
    assert prolora.check(out, base=old)
    third = tmp_path / "third.safetensors"
    save_file({k: v + 0.01 * torch.randn_like(v) for k, v in make_base().items()}, third)
    moved = prolora.transfer(out, old, third, method="copy")
    assert moved.report.coverage == 1
    with pytest.raises(prolora.errors.WrongBase):
        prolora.transfer(out, new, old, method="copy")  # by the hash in its header


def test_all_that_no_lora_holds_is_named_with_its_norm_and_counts_in_the_share():
    """Scalars, gates, tables, embeddings, convolutions of three axes, and another model."""
    base = make_base()
    encoder = "text_encoder.text_model.embeddings.token_embedding"
    others = {
        "mid_block.attentions.0.gate": torch.zeros(8),
        "mid_block.attentions.0.scale_factor": torch.zeros(()),
        "mid_block.attentions.0.table": torch.zeros(4, 8),
        "mid_block.attentions.0.steps": torch.zeros(3, dtype=torch.int64),
        "mid_block.attentions.0.time_conv.weight": torch.zeros(8, 8, 3, 1, 1),
        f"{encoder}.weight": torch.zeros(9, 8),
        "mid_block.pool.in_proj_weight": torch.zeros(24, 8),
    }
    vae = "first_stage_model.decoder.conv_in"
    tuned = merge(base, adapter_of(LINEAR, rank=2).updates)
    matrices = sum(float((tuned[k].double() - base[k].double()).square().sum()) for k in tuned)
    tuned[f"{NORM}.bias"] = torch.full((8,), 2.0)
    tuned |= {name: tensor + 1 for name, tensor in others.items()}
    base |= others
    report = prolora.extract(base, tuned, out_rank=2, dtype="float32").report
    lost = {name: tensor.numel() for name, tensor in others.items()}
    assert set(report.left_out) == {name.removesuffix(".weight") for name in lost}
    for name, count in lost.items():
        (row,) = [r for r in report.modules if r.source == name.removesuffix(".weight")]
        assert row.status == "skipped" and row.energy == pytest.approx(count)
        assert f"norm of its difference is {count**0.5:.3g}" in report.left_out[row.source]
    whole = matrices + 32 + sum(lost.values())
    assert report.share_held == pytest.approx((matrices + 32) / whole, rel=1e-5)
    assert f"{report.share_held:.2%}" in report.in_words().headline
    model = {f"model.diffusion_model.{k}": v for k, v in make_base().items()}
    more = {f"model.diffusion_model.{k}": v for k, v in make_base(1).items()}
    model[f"{vae}.bias"], more[f"{vae}.bias"] = torch.zeros(2), torch.ones(2)
    left = prolora.extract(model, more, out_rank=2).report.left_out
    assert "another model" in left["first_stage_model"] and "1 of its" in left["first_stage_model"]
    more[f"{vae}.bias"] = model[f"{vae}.bias"]
    assert not prolora.extract(model, more, out_rank=2).report.left_out
