"""LoRAs become one that does what all of them do, and the report says what of each is in it."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import read_header, read_lora
from mini import BLOCK, MODULES, shapes, source_weights, write_case
from property_examples import examples
from safetensors.torch import load_file, save_file

import prolora
from prolora import errors
from prolora.core import merging


def make_lora(rank, seed, modules=None):
    """A kohya LoRA, and its updates in float64."""
    generator = torch.Generator().manual_seed(seed)
    tensors, dense = {}, {}
    for name in modules or shapes(3):
        m, n = shapes(3)[name]
        up = torch.randn(m, rank, generator=generator)
        down = torch.randn(rank, n, generator=generator)
        key, alpha = "lora_unet_" + name.replace(".", "_"), 2.0 + seed
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
        dense[name] = up.double() @ down.double() * alpha / rank
    return tensors, dense


def add(dense, strengths):
    total = {}
    for some, strength in zip(dense, strengths, strict=True):
        for name, delta in some.items():
            total[name] = total.get(name, 0) + strength * delta
    return total


def write(folder, loras, names="ab"):
    """Files of several LoRAs."""
    paths = [folder / f"{name}.safetensors" for name in names]
    for path, tensors in zip(paths, loras, strict=True):
        save_file(tensors, path)
    return paths


def error(adapter, wanted):
    """‖merged − wanted‖/‖wanted‖ over all modules, dense."""
    assert set(adapter.updates) == set(wanted)
    lost = kept = 0.0
    for name, delta in wanted.items():
        update = adapter.updates[name]
        lost += float((update.up.double() @ update.down.double() - delta).norm() ** 2)
        kept += float(delta.norm() ** 2)
    return (lost / kept) ** 0.5


@given(
    ranks=st.lists(st.integers(1, 20), min_size=2, max_size=4),
    strengths=st.lists(st.sampled_from([1.0, 0.3, -0.7, 4.0]), min_size=4, max_size=4),
    method=st.sampled_from(["sum", "balanced"]),
    seed=st.integers(0, 20),
)
@settings(max_examples=examples(20))
def test_a_merge_that_cuts_nothing_is_the_exact_sum(ranks, strengths, method, seed):
    made = [make_lora(rank, seed + i) for i, rank in enumerate(ranks)]
    strengths = strengths[: len(ranks)]
    done = prolora.merge([lora for lora, _ in made], strengths=strengths, method=method)
    if method == "sum":
        assert error(done.adapter, add([dense for _, dense in made], strengths)) < 1e-6
    assert done.report.share_held == pytest.approx(1.0, abs=1e-6)
    back = read_lora(done.state_dict("kohya", dtype="float32"))
    for name, update in done.adapter.updates.items():
        assert torch.allclose(back.updates[name].dense(), update.dense(), atol=1e-5)


def test_modules_that_one_lora_has_are_kept():
    names = list(shapes(3))
    (one, first), (two, second) = make_lora(2, 0, names[:5]), make_lora(3, 1, names[4:])
    done = prolora.merge([one, two], strengths=[0.5, 2])
    assert error(done.adapter, add([first, second], [0.5, 2])) < 1e-6
    assert [update.rank for update in done.adapter.updates.values()] == [2] * 4 + [5] + [3] * 7
    assert len(done.report.overlaps) == 1


@pytest.mark.parametrize("out_rank", [1, 0.6, "50%"])
def test_what_a_cut_keeps_of_each_lora_is_told_as_dense_matrices_have_it(out_rank, tmp_path):
    made = [make_lora(3, 0), make_lora(2, 5)]
    paths = write(tmp_path, [lora for lora, _ in made], ("strong", "weak"))
    out = tmp_path / "out.safetensors"
    report = prolora.merge(paths, out=out, strengths=(1, 0.1), out_rank=out_rank).report
    written, total = read_lora(out), add([d for _, d in made], (1, 0.1))
    assert max(update.rank for update in written.updates.values()) <= 4
    lost = max(0.0, 1 - report.share_held) ** 0.5
    assert lost == pytest.approx(error(written, total), rel=1e-3)
    for part, strength, (_, dense) in zip(report.parts, (1, 0.1), made, strict=True):
        products = norms = 0.0
        for name, delta in dense.items():
            update = written.updates[name]
            merged = update.up.double() @ update.down.double()
            products += float((merged * strength * delta).sum())
            norms += float((strength * delta).norm() ** 2)
        assert part.kept == pytest.approx(products / norms, rel=1e-3)
    if out_rank == 1:
        assert any("weak mostly loses" in line for line in report.in_words().cautions)


def test_loras_that_do_the_same_are_told_and_balanced():
    tensors, dense = make_lora(3, 0)
    other, _ = make_lora(3, 9, list(shapes(3))[:1])
    done = prolora.merge([tensors, tensors])
    assert done.report.parts[0].kept == pytest.approx(2.0, rel=1e-5)
    (caution,) = done.report.in_words().cautions
    assert "do the same in 12 of 12 modules" in caution and "method='balanced'" in caution
    once = prolora.merge([tensors, tensors], method="balanced")
    assert error(once.adapter, dense) < 1e-6
    told = once.report.in_words()
    assert "of the balanced sum of" in told.headline and "do the same" not in str(told)
    against = prolora.merge([tensors, tensors], strengths=(1, -0.9))
    assert any("cancel in 12 of 12" in line for line in against.report.in_words().cautions)
    apart = prolora.merge([tensors, other])
    assert apart.report.in_words().cautions == ()


def test_the_header_tells_parts_strengths_and_words(tmp_path):
    paths = []
    for i, (name, words) in enumerate([("cat", "catto"), ("dog", "doggo")]):
        paths.append(tmp_path / f"{name}.safetensors")
        header = {
            "modelspec.trigger_phrase": words,
            "ss_sd_model_name": "xl.safetensors",
            "ss_output_name": name,
            "ss_tag_frequency": json.dumps({"10_x": {words: 5}}),
            "sshs_model_hash": "0" * 64,
        }
        save_file(make_lora(2, i)[0], paths[-1], header)
    out = tmp_path / "out.safetensors"
    report = prolora.merge(paths, out=out, strengths=(1, 0.5)).report
    header = read_header(out)
    assert header["modelspec.trigger_phrase"] == "catto, doggo"
    assert header["modelspec.merged_from"] == "cat, dog"
    assert header["ss_sd_model_name"] == "xl.safetensors" and "ss_output_name" not in header
    assert json.loads(header["ss_tag_frequency"]) == {
        "10_x": {"catto": 5},
        "10_x (dog)": {"doggo": 5},
    }
    merged = json.loads(header["prolora.merged"])
    assert [(part["name"], part["strength"]) for part in merged] == [("cat", 1.0), ("dog", 0.5)]
    assert merged[0]["trigger"] == "catto" and merged[0]["digest"].startswith("sha256:")
    assert prolora.check(out).trigger_words[0] == "catto, doggo"
    assert [part.name for part in report.parts] == ["cat", "dog"]
    again = prolora.merge(paths, out=out, strengths=(1, 0.5), overwrite=True).report
    assert again.totals == report.totals
    with pytest.raises(errors.OutputError):
        prolora.merge(paths, out=paths[1])
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    with pytest.raises(errors.OutputExists):
        prolora.merge(paths, out=tmp_path / "mine.safetensors")


def test_convolutions_text_encoders_and_other_kinds_are_summed_too(tmp_path):
    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    generator = torch.Generator().manual_seed(0)
    conv, text = "lora_unet_down_blocks_0_resnets_0_conv1", "lora_te1_text_model_encoder_layers_0"
    text += "_self_attn_q_proj"
    loras, dense = [], []
    for rank in (2, 3):
        up, down = draw(8, rank, 1, 1), draw(rank, 6, 3, 3)
        tensors = {f"{conv}.lora_up.weight": up, f"{conv}.lora_down.weight": down}
        loras.append(tensors)
        dense.append({"conv1": up.flatten(1).double() @ down.flatten(1).double()})
    up, down = draw(10, 2), draw(2, 12)
    loras[0] |= {f"{text}.lora_up.weight": up, f"{text}.lora_down.weight": down}
    hada = [draw(10, 2), draw(2, 12), draw(10, 2), draw(2, 12)]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    loras[1] |= {f"{text}.{name}": x for name, x in zip(names, hada, strict=True)}
    dense[0]["q_proj"] = up.double() @ down.double()
    a, b, c, d = (x.double() for x in hada)
    dense[1]["q_proj"] = (a @ b) * (c @ d)
    paths, out = write(tmp_path, loras), tmp_path / "out.safetensors"
    prolora.merge(paths, out=out, strengths=(1, -0.5), dtype="float32")
    back = read_lora(out)
    wanted = add(dense, (1, -0.5))
    assert len(back.updates) == 2 and list(back.kernels.values()) == [(3, 3)]
    for name, update in back.updates.items():
        delta = wanted[name.rpartition(".")[2]]
        found = update.up.double() @ update.down.double()
        assert (found - delta).norm() < 1e-5 * delta.norm(), name


def test_a_fused_weight_of_flux_keeps_its_ranks(tmp_path):
    loras = []
    for seed, rank in ((0, 2), (1, 3)):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for key, out in (("img_attn_qkv", 9216), ("img_attn_proj", 3072)):
            start = f"lora_unet_double_blocks_0_{key}"
            up, down = torch.randn(out, rank, generator=generator), torch.randn(rank, 3072)
            tensors |= {f"{start}.lora_up.weight": up, f"{start}.lora_down.weight": down}
        loras.append(tensors)
    done = prolora.merge(loras, strengths=(1, 0.5))
    written = done.state_dict("kohya", dtype="float32")
    assert set(loras[0]) <= set(written)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    up, down = (written[f"{key}.lora_{side}.weight"] for side in ("up", "down"))
    assert up.shape == (9216, 5)
    wanted = sum(
        s * x[f"{key}.lora_up.weight"] @ x[f"{key}.lora_down.weight"]
        for s, x in zip((1, 0.5), loras, strict=True)
    )
    assert (up @ down - wanted).norm() < 1e-6 * wanted.norm()


def test_the_family_is_one_that_all_modules_can_be_of():
    """Chroma has the double blocks of FLUX without their modulation."""
    loras = []
    for key, out in (("img_attn_qkv", 9216), ("img_mod_lin", 18432)):
        start = f"lora_unet_double_blocks_0_{key}.lora"
        tensors = {f"{start}_up.weight": torch.ones(out, 1)}
        loras.append(tensors | {f"{start}_down.weight": torch.ones(1, 3072)})
    families = [read_lora(lora).model.families for lora in loras]
    assert "chroma" in families[0] and "chroma" not in families[1]
    done = prolora.merge(loras)
    assert "flux" in done.adapter.model.families and "chroma" not in done.adapter.model.families
    assert set(done.state_dict("kohya")) >= {key for lora in loras for key in lora}


def test_loras_in_eight_bits_are_merged_in_sixteen(tmp_path):
    small, half = make_lora(2, 0)[0], make_lora(2, 1)[0]
    small = {k: v.to(torch.float8_e4m3fn) if "alpha" not in k else v for k, v in small.items()}
    half = {k: v.to(torch.bfloat16) for k, v in half.items()}
    paths, out = write(tmp_path, [small, half]), tmp_path / "out.safetensors"
    prolora.merge(paths, out=out)
    assert {v.dtype for v in load_file(out).values()} == {torch.float32}  # holds both
    prolora.merge(paths[:1] * 2, out=out, overwrite=True)
    assert {v.dtype for v in load_file(out).values()} == {torch.float16}


@pytest.mark.parametrize("strengths", [(1, 1), (1, -1)])
def test_a_balanced_merge_does_what_biases_do_alike_once_too(strengths):
    (one, _), (two, _) = make_lora(1, 0), make_lora(1, 1)
    stem = "lora_unet_{}.diff_b".format
    alike, apart, alone = (BLOCK.format(0, name).replace(".", "_") for name in MODULES[:3])
    half = torch.cat([torch.ones(12), torch.zeros(12)])
    one |= {stem(alike): torch.arange(24.0), stem(apart): half, stem(alone): torch.ones(24)}
    two |= {stem(alike): torch.arange(24.0), stem(apart): 1 - half}
    told = {}
    for method in ("sum", "balanced"):
        vectors = prolora.merge([one, two], method=method, strengths=strengths).adapter.vectors
        told[method] = [vectors[f"{BLOCK.format(0, name)}.bias"] for name in MODULES[:3]]
    second = strengths[1]
    added = [torch.arange(24.0) * (1 + second), half + second * (1 - half), torch.ones(24)]
    wanted = [torch.arange(24.0), *added[1:]] if second > 0 else added
    for method, expected in (("sum", added), ("balanced", wanted)):
        for vector, right in zip(told[method], expected, strict=True):
            assert torch.allclose(vector, right, atol=1e-4), method


def test_no_two_loras_of_a_merge_have_one_name(tmp_path):
    paths = [tmp_path / folder / f"{n}.safetensors" for folder, n in ("ax", "ay", "by", "cy")]
    paths.append(tmp_path / "a" / "y (3).safetensors")
    paths.append(tmp_path / "d" / "a" / "y.safetensors")
    for i, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True, parents=True)
        save_file(make_lora(1, i)[0], path, {"modelspec.author": f"author {i}"})
    out = tmp_path / "out.safetensors"
    report = prolora.merge(paths, out=out).report
    names = [part.name for part in report.parts]
    assert names == ["x", "a/y", "b/y", "c/y", "y (3)", "a/y (2)"]
    metadata = read_header(out)
    assert metadata["modelspec.author"] == ", ".join(f"author {i}" for i in range(6))
    assert metadata["modelspec.title"] == " + ".join(names)
    merged = json.loads(metadata["prolora.merged"])
    assert [part["name"] for part in merged] == names
    in_memory = [read_lora(make_lora(1, i)[0]) for i in range(3)]
    called = [replace(lora, metadata={"ss_output_name": "LoRA 3"}) for lora in in_memory[:2]]
    in_memory = [*called, in_memory[2]]
    names = [part.name for part in prolora.merge(in_memory).report.parts]
    assert names == ["LoRA 3", "LoRA 3 (2)", "LoRA 3 (3)"]


def write_wan(path, module="blocks.0.self_attn.q", width=5120):
    path.parent.mkdir(exist_ok=True)
    key, size = f"diffusion_model.{module}", (width, 2)
    up, down = torch.ones(size), torch.ones(size[::-1])
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, path)
    return path


@pytest.mark.parametrize(
    "names",
    [
        ("x_high_noise.safetensors", "x_low_noise.safetensors"),
        ("x_HIGH.safetensors", "y-low.safetensors"),
        ("high_noise/lora.safetensors", "low_noise/lora.safetensors"),
    ],
)
def test_loras_of_the_two_experts_of_one_model_are_refused(names, tmp_path):
    paths = [write_wan(tmp_path / name) for name in names]
    with pytest.raises(errors.WrongBase, match=r"high noise.*low noise.*Wan"):
        prolora.merge(paths)
    with pytest.raises(errors.WrongBase, match="expert"):
        prolora.merge(paths, out=tmp_path / "out.safetensors")
    prolora.merge([write_wan(tmp_path / "a_low_noise.safetensors"), paths[1]])
    high = tmp_path / "wan_high_noise.safetensors"
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, high)
    with pytest.raises(errors.WrongBase, match=r"wan_high.*a_low_noise"):
        prolora.merge([tmp_path / "a_low_noise.safetensors"] * 2, high)


def test_high_and_low_in_names_mean_nothing_for_a_model_without_experts(tmp_path):
    loras = [make_lora(1, i)[0] for i in range(2)]
    paths = write(tmp_path, loras, ("detail_high", "detail_low"))
    assert len(prolora.merge(paths).report.parts) == 2


def test_each_lora_has_factors_of_its_own_by_block(tmp_path):
    made = [make_lora(2, 0), make_lora(3, 1)]
    paths = write(tmp_path, [lora for lora, _ in made])
    stack = BLOCK.rpartition(".{}.{}")[0]
    blocks = [{f"{stack}.0": 0, f"{stack}.1": 0.5}, None]
    out = tmp_path / "out.safetensors"
    text = f"{stack}.0=0, {stack}.1=0.5;"
    for asked in (blocks, text):
        how = {"out": out, "overwrite": True, "strengths": (2, 1)}
        report = prolora.merge(paths, blocks=asked, **how).report
        factors = {0: 0.0, 1: 0.5, 2: 1.0}
        first = {n: factors[int(n.split(".")[5])] * x for n, x in made[0][1].items()}
        assert error(read_lora(out), add([first, made[1][1]], (2, 1))) < 1e-6
        assert report.parts[0].kept == pytest.approx(1.0, abs=0.1)
        assert len(report.rows("skipped")) == 4 and "a: " in report.blocks
        merged = json.loads(read_header(out)["prolora.merged"])
        assert merged[0]["blocks"] == text[:-1] and "blocks" not in merged[1]


def test_loras_of_a_unet_and_a_transformer_of_no_published_size_are_refused_by_their_names():
    unet, _ = make_lora(1, 0)
    path = "transformer.single_transformer_blocks.0.attn.to_q.lora"
    other = {f"{path}_A.weight": torch.ones(1, 24), f"{path}_B.weight": torch.ones(24, 1)}
    with pytest.raises(errors.WrongBase, match=r"has names of FLUX\.1.* has names of Stable Diff"):
        prolora.merge([unet, other])


def test_modules_of_two_shapes_are_refused_by_name():
    one, _ = make_lora(1, 0)
    two = {k: torch.cat([v, v]) if "lora_up" in k else v for k, v in make_lora(1, 1)[0].items()}
    with pytest.raises(errors.ShapeMismatch, match="to_q is 48×24 in LoRA 2 and 24×24 in LoRA 1"):
        prolora.merge([one, two])


def test_a_state_dict_with_its_configuration_is_one_lora():
    peft = pytest.importorskip("peft")
    tensors = {f"base_model.model.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    pair = tensors, peft.LoraConfig(r=2, lora_alpha=6)
    with pytest.raises(errors.InvalidOption, match=r"LoraConfig\) is one LoRA.* list"):
        prolora.merge(pair)
    merged = prolora.merge([pair, pair], out_rank=2).adapter.updates["to_q"]
    assert torch.allclose(merged.dense(), torch.full((2, 2), 12.0))


@pytest.mark.parametrize(
    ("count", "changes", "text"),
    [
        (1, {}, "two LoRAs or more"),
        (2, {"strengths": [1]}, "`strengths` has 1, and there are 2 LoRAs"),
        (2, {"strengths": [1, 0]}, "none of them 0"),
        (2, {"strengths": [1, float("nan")]}, "none of them 0"),
        (2, {"strengths": "1,1"}, "must be a number for each LoRA"),
        (2, {"blocks": "1,0"}, "`blocks` has 1, and there are 2"),
        (2, {"blocks": "1,x;"}, "which is not a number"),
        (2, {"blocks": "none.such=1;"}, "block or module of"),
        (2, {"method": "median"}, "`method` must be one of sum, balanced"),
        (2, {"method": max}, "`method` must be one of sum, balanced"),
    ],
)
def test_wrong_numbers_are_refused(count, changes, text):
    with pytest.raises(errors.InvalidOption, match=text):
        prolora.merge([make_lora(1, 0)[0]] * count, **changes)


def test_a_lora_of_another_base_without_that_base_is_refused(tmp_path):
    lora, _, target = write_case(tmp_path)  # it has a block that the target lacks
    with pytest.raises(prolora.ProLoRAError, match="lora is not a LoRA of the base of the result"):
        prolora.merge([lora, lora], target)


def test_dora_needs_the_base_and_has_it_from_the_target(tmp_path):
    tensors, _ = make_lora(2, 0)
    plain, dense = make_lora(2, 1)
    wanted = {}
    for name, weight in source_weights().items():
        key = "lora_unet_" + name.replace(".", "_")
        magnitude = 1 + torch.rand(len(weight), 1, generator=torch.Generator().manual_seed(2))
        tensors[f"{key}.dora_scale"] = magnitude
        up, down = (tensors[f"{key}.lora_{side}.weight"].double() for side in ("up", "down"))
        merged = weight.double() + up @ down * 2 / 2
        wanted[name] = merged / merged.norm(dim=1, keepdim=True) * magnitude - weight.double()
    with pytest.raises(errors.UnsupportedFormat, match="give the base model"):
        prolora.merge([tensors, plain])
    base = {f"{n}.weight": w for n, w in source_weights().items()}
    done = prolora.merge([plain, tensors], base)
    assert error(done.adapter, add([dense, wanted], (1, 1))) < 1e-5


def test_different_bases_in_the_headers_are_told(tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for i, path in enumerate(paths):
        save_file(make_lora(1, i)[0], path, {"ss_sd_model_name": f"base{i}.safetensors"})
        twin = "base1.safetensors" if i else "base1-fp16.safetensors"
        save_file(make_lora(1, i)[0], tmp_path / f"same{i}.safetensors", {"ss_sd_model_name": twin})
    same = prolora.merge([tmp_path / "same0.safetensors", tmp_path / "same1.safetensors"])
    assert not same.report.in_words().cautions
    words = prolora.merge(paths).report.in_words()
    assert "a on base0.safetensors, b on base1.safetensors" in words.cautions[-1]


def test_an_update_that_cannot_be_read_stays_behind_by_name():
    (one, _), (two, _) = make_lora(1, 0), make_lora(1, 1)
    name = next(iter(shapes(3)))
    one[f"lora_unet_{name.replace('.', '_')}.lora_gate"] = torch.ones(2)
    report = prolora.merge([one, two]).report
    assert report.unread == (name,) and "could not be read" in report.in_words().cautions[0]


def test_diffusers_draws_the_same_with_the_merged_file_as_with_all_adapters(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    import tiny_pipelines

    folder = tiny_pipelines.save(tmp_path / "base")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    loras = []
    for i, leaves in enumerate([("attn1.to_q", "ff.net.2"), ("attn2.to_v", "attn1.to_q")]):
        updates = tiny_pipelines.updates(pipe.unet, leaves, size=0.3 + 0.2 * i)
        if i:  # another direction in the module that both have
            updates = {n: type(u)(u.up.flip(0), u.down.flip(1)) for n, u in updates.items()}
        loras.append(tiny_pipelines.write_lora(tmp_path / f"{'ab'[i]}.safetensors", updates))

    def draw():
        generator = torch.Generator().manual_seed(0)
        known = {"num_inference_steps": 2, "output_type": "np", "generator": generator}
        return torch.from_numpy(pipe("a b", **known).images)

    plain = draw()
    for name, lora in zip("ab", loras, strict=True):
        pipe.load_lora_weights(lora, adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.8, 0.5])
    both = draw()
    pipe.set_adapters(["a", "b"], [0.8, 0.1])
    weaker = draw()
    pipe.unload_lora_weights()
    out = tmp_path / "both.safetensors"
    prolora.merge(loras, out=out, strengths=(0.8, 0.5), dtype="float32")
    pipe.load_lora_weights(out)
    merged = draw()
    assert (merged - both).abs().max() < 1e-4
    assert (merged - weaker).abs().max() > 1e-3 and (merged - plain).abs().max() > 1e-3


def test_a_lora_that_was_moved_to_another_base_is_no_lora_of_the_result(tmp_path):
    lora, source, target = write_case(tmp_path)
    moved = tmp_path / "moved.safetensors"
    prolora.transfer(lora, source, target, out=moved)
    with pytest.raises(errors.AlreadyMoved, match="moved is not a LoRA of the base of the result"):
        prolora.merge([moved, lora], source)
    with pytest.raises(errors.AlreadyMoved, match=f"the base is .*{source.name}; give .* base$"):
        prolora.bake(moved, source, tmp_path / "baked")


def test_of_two_losses_the_larger_is_told():
    updates = read_lora(make_lora(2, 0)[0]).updates
    first, *others = updates
    parts = [
        prolora.Adapter(updates, kept_energy={first: 0.6, others[0]: 0.9}),
        prolora.Adapter(updates, kept_energy={first: 0.7}),
    ]
    for some in (parts, parts[::-1]):
        assert prolora.merge(some).report.kept_energy == {first: 0.6, others[0]: 0.9}


def test_loras_that_cancel_are_told_to_change_nothing(tmp_path):
    lora, *_ = write_case(tmp_path)
    said = prolora.merge([lora, lora], out=tmp_path / "out.safetensors", strengths=[1, -1]).report
    assert (tmp_path / "out.safetensors").is_file()
    assert "changes nothing" in said.in_words().headline and said.in_words().mark == "⚠"


@pytest.mark.parametrize("method", ["sum", "balanced"])
def test_what_is_zero_in_all_loras_is_zero_in_the_merge(method):
    module = BLOCK.format(0, MODULES[0])
    stem = "lora_unet_" + module.replace(".", "_")
    loras = [make_lora(1, i)[0] | {f"{stem}.diff_b": torch.zeros(24)} for i in range(2)]
    for lora in loras:
        lora[f"{stem}.lora_up.weight"] = torch.zeros_like(lora[f"{stem}.lora_up.weight"])
    merged = prolora.merge(loras, method=method).adapter
    assert torch.equal(merged.vectors[f"{module}.bias"], torch.zeros(24))
    assert not merged.updates[module].dense().any()
    assert all(u.dense().any() for name, u in merged.updates.items() if name != module)
    zero = {key: x * 0 for key, x in loras[0].items() if not key.endswith("diff_b")}
    parts = prolora.merge([loras[1], zero], method=method).report.parts
    assert [(part.kept, part.energy > 0) for part in parts] == [
        (pytest.approx(1), True),
        (1, False),
    ]


def test_loras_of_two_models_are_refused_behind_one_that_is_for_either():
    sizes = {
        "transformer_blocks.0.attn.to_q": (3072, 3072),
        "transformer_blocks.0.img_mlp.net.0.proj": (12288, 3072),  # Qwen-Image's
        "transformer_blocks.0.norm1.linear": (18432, 3072),  # FLUX.1's, and others'
    }
    either, one, other = (
        {f"transformer.{n}.lora_A.weight": torch.zeros(1, i)}
        | {f"transformer.{n}.lora_B.weight": torch.zeros(o, 1)}
        for n, (o, i) in sizes.items()
    )
    for pair in ([either, one], [either, other]):
        assert len(prolora.merge(pair).adapter.updates) == 2
    with pytest.raises(errors.WrongBase, match=r"LoRA 3 is for .*FLUX.*LoRA 2 is for Qwen-Image"):
        prolora.merge([either, one, other])


def test_what_two_loras_share_is_measured_once(monkeypatch):
    """It was twice, and a third of the time of a merge of twenty LoRAs was the second time."""
    loras, dense = zip(*(make_lora(2, seed, list(shapes(1))) for seed in range(6)), strict=True)
    merge, measured, measure = prolora.merge, [], merging.inner_product
    note = lambda a, b: (measured.append((a, b)), measure(a, b))[1]  # noqa: E731
    monkeypatch.setattr(merging, "inner_product", note)
    report = merge(loras).report
    assert len(report.overlaps) == 15 * len(shapes(1)) and len(measured) == 21 * len(shapes(1))
    for row in report.overlaps:
        a, b = (dense[i][row.module] for i in (row.first, row.second))
        cosine = float((a * b).sum() / a.norm() / b.norm())
        assert row.cosine == pytest.approx(cosine, abs=1e-6)
