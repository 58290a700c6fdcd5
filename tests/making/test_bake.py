"""A baked model is the base with the update in it, to the last bit, and says what survived."""

import json
import re
import shutil

import mini
import pytest
import tiny_pipelines
import torch
from family_files import make_authors_file, name_weights
from family_shapes import list_authors_keys
from safetensors.torch import load_file, save_file

from prolora import bake, open_base
from prolora.architectures.families import known_families
from prolora.architectures.layouts import load_layout
from prolora.errors import InvalidOption, NonFiniteWeights, OutputError, OutputExists, ProLoRAError
from prolora.files.safetensors_file import SafetensorsFile

MODULE, KEPT = (f"transformer_blocks.0.attn.to_{leaf}" for leaf in "qk")
PLAIN = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        ("pixart", r"transformer_blocks\.0\.attn1\.to_[qkv]"),
        ("flux", r"transformer_blocks\.0\.attn\.to_[qkv]|norm_out\.linear"),
    ],
)
def test_an_update_equal_to_the_weights_doubles_the_authors_file(family, pattern, tmp_path):
    """Fused matrices and exchanged halves get their rows where the authors have them."""
    known = known_families()[family]
    layout = load_layout(known.layouts[0])
    names = {name: x for name, x in layout.shapes.items() if re.fullmatch(pattern, name)}
    file = make_authors_file(known, layout.id, names.__contains__)
    columns = list_authors_keys(known, names)
    rows = {key: x % 97 for key, x in name_weights(file.stored).items()}
    stored = {key: x.half().expand(-1, columns[key][1]).contiguous() for key, x in rows.items()}
    assert len(stored) < len(names)
    base, lora, out = (tmp_path / f"{name}.safetensors" for name in ("base", "lora", "out"))
    save_file(stored | {"kept": torch.arange(5)}, base, {"a": "header"})
    updates = {}
    for name, x in file.expected.items():
        updates[f"transformer.{name}.lora_A.weight"] = torch.ones(1, names[name][1])
        updates[f"transformer.{name}.lora_B.weight"] = (x % 97).float()
    save_file(updates, lora)
    done = bake([lora], base, out)
    baked, wanted = load_file(out), {key: 2 * x for key, x in stored.items()}
    assert [key for key, x in baked.items() if not torch.equal(x, wanted.get(key, x))] == []
    assert done.whole.survived == pytest.approx(1) and done.whole.error == 0
    assert done.in_words().mark == "✔"
    assert torch.equal(baked["kept"], torch.arange(5))
    one, other = SafetensorsFile(base), SafetensorsFile(out)
    assert one.tensors == other.tensors and one.metadata == other.metadata


def make_case(tmp_path, dtype=torch.bfloat16, share=0.1, scale=None):
    """A base of two weights [64, 48] and a LoRA on the first, of a share of its norm."""
    torch.manual_seed(0)
    weight, up, down = torch.randn(64, 48) * 0.1, torch.randn(64, 4), torch.randn(4, 48)
    up *= share * weight.norm() / (up @ down).norm()
    codes = (weight / (scale or 1)).to(dtype)
    tensors = {f"{MODULE}.weight": codes, f"{KEPT}.weight": codes.clone()}
    if scale:
        tensors |= {f"{name}.scale_weight": torch.tensor(scale) for name in (MODULE, KEPT)}
        tensors["scaled_fp8"] = torch.empty(0, dtype=dtype)
    save_file(tensors, tmp_path / "base.safetensors")
    names = ("lora_A", "lora_B")
    lora = {f"transformer.{MODULE}.{n}.weight": x for n, x in zip(names, (down, up), strict=True)}
    save_file(lora, tmp_path / "lora.safetensors")
    before = codes.float() * (scale or 1)
    return tmp_path / "lora.safetensors", tmp_path / "base.safetensors", before, up @ down


def round_to(x, dtype, scale):
    codes, most = x / (scale or 1), torch.finfo(dtype).max
    return codes.clamp(-most, most).to(dtype).float() * (scale or 1)


@pytest.mark.parametrize(
    ("dtype", "scale", "share"),
    [
        (torch.float32, None, 0.1),
        (torch.float16, None, 0.1),
        (torch.bfloat16, None, 0.01),
        (torch.float8_e4m3fn, None, 0.02),
        (torch.float8_e4m3fn, 0.002, 0.02),
        (torch.float8_e5m2, 1e-5, 1.0),  # beyond the largest code
        (torch.float8_e5m2, 0.0001, 0.1),
    ],
)
def test_what_survives_is_what_a_float64_sum_says(tmp_path, dtype, scale, share):
    lora, base, before, delta = make_case(tmp_path, dtype, share, scale)
    done = bake([lora], base, tmp_path / "out.safetensors")
    wanted = round_to(before + delta, dtype, scale)
    got = open_base(tmp_path / "out.safetensors").read(MODULE).float()
    assert torch.equal(got, wanted)
    change, delta = (wanted - before).double(), delta.double()
    survived = float((change * delta).sum() / delta.square().sum())
    assert done.whole.survived == pytest.approx(survived, 1e-5)
    error = float((change - delta).norm() / delta.norm())
    assert done.whole.error == pytest.approx(error, rel=1e-5, abs=1e-6)
    assert (done.in_words().mark == "⚠") == (done.whole.survived < 0.9)
    assert json.loads(json.dumps(done.to_dict()))["modules"] == {MODULE: done.whole.survived}


@pytest.mark.parametrize(
    ("dtype", "stored"), [("bfloat16", torch.bfloat16), ("float16", torch.half)]
)
def test_a_scaled_base_is_written_whole_in_another_type_where_all_survives(tmp_path, dtype, stored):
    lora, base, before, delta = make_case(tmp_path, torch.float8_e4m3fn, 0.005, 0.002)
    out = tmp_path / "out.safetensors"
    assert bake([lora], base, tmp_path / "fp8.safetensors").whole.survived < 0.5
    done = bake([lora], base, out, dtype=dtype)
    assert done.whole.survived == pytest.approx(1, abs=0.1) and done.dtypes == {dtype: 1}
    baked = load_file(out)
    assert baked.keys() == {f"{MODULE}.weight", f"{KEPT}.weight"}
    assert torch.equal(baked[f"{MODULE}.weight"], (before + delta).to(stored))
    assert torch.equal(baked[f"{KEPT}.weight"], before.to(stored))
    assert not open_base(out).quantised_as and "byte for byte" not in str(done.to_dict())


def test_stochastic_rounding_keeps_in_the_mean_what_nearest_loses(tmp_path):
    lora, base, before, delta = make_case(tmp_path, torch.float8_e4m3fn, 0.005, 0.002)
    nearest = bake([lora], base, tmp_path / "nearest.safetensors")
    outs = [tmp_path / f"{seed}.safetensors" for seed in range(30)]
    seeds = [bake([lora], base, out, stochastic=seed) for seed, out in enumerate(outs)]
    again = bake([lora], base, tmp_path / "again.safetensors", stochastic=7)
    assert again.whole.survived == seeds[7].whole.survived
    assert nearest.whole.survived < 0.5 and "stochastic" in str(nearest)
    mean = sum(done.whole.survived for done in seeds) / len(seeds)
    spread = torch.tensor([done.whole.survived for done in seeds]).std() / len(seeds) ** 0.5
    assert abs(mean - 1) < 4 * spread
    read = [open_base(out).read(MODULE).float() for out in outs]
    one_step = (torch.stack(read) - before - delta).abs().amax(0)
    assert (one_step <= before.abs().clamp_min(0.002 * 2**-6) * 0.26 + delta.abs()).all()


def test_several_loras_are_added_with_their_strengths(tmp_path):
    lora, base, before, delta = make_case(tmp_path, torch.float32)
    bake([lora, lora], base, tmp_path / "out.safetensors", strengths=[0.5, -2.0])
    got = open_base(tmp_path / "out.safetensors").read(MODULE)
    assert torch.allclose(got, before - 1.5 * delta, atol=1e-6)
    blocks = ["transformer_blocks.0=0.25"]
    bake([lora], base, tmp_path / "less.safetensors", strengths=[2.0], blocks=blocks)
    got = open_base(tmp_path / "less.safetensors").read(MODULE)
    assert torch.allclose(got, before + 0.5 * delta, atol=1e-6)


@pytest.mark.parametrize(("blocks", "wanted"), [(None, 1.0), (["transformer_blocks.0=0.5"], 0.5)])
def test_biases_and_norms_are_added_too_by_their_block(tmp_path, blocks, wanted):
    lora, base, _, _ = make_case(tmp_path, torch.float16)
    bias, more = torch.arange(64.0).half(), torch.full((64,), 0.5)
    save_file(load_file(base) | {f"{MODULE}.bias": bias}, base)
    save_file({f"diffusion_model.{MODULE}.diff_b": more}, lora)
    done = bake([lora], base, tmp_path / "out.safetensors", strengths=[2.0], blocks=blocks)
    assert torch.equal(load_file(tmp_path / "out.safetensors")[f"{MODULE}.bias"], bias + wanted)
    assert [row.module for row in done.modules] == [f"{MODULE}.bias"]


def test_where_a_baked_folder_cannot_go_is_said_before_work(tmp_path):
    base = mini.write_folder(tmp_path / "pipe" / "unet", mini.source_weights()).parent
    (base / "model_index.json").write_text("{}")
    save_file(mini.lora_tensors(), tmp_path / "lora.safetensors")
    bake([tmp_path / "lora.safetensors"], base, tmp_path / "baked")
    with pytest.raises(InvalidOption, match="folder"):
        bake([tmp_path / "lora.safetensors"], base, tmp_path / "other", dtype="float16")
    for out, error, options in (
        ("baked", OutputError, {}),
        ("baked", InvalidOption, {"overwrite": True}),
        ("new.safetensors", OutputError, {}),
        ("pipe/baked", OutputError, {}),
    ):
        with pytest.raises(error, match="folder"):
            bake([tmp_path / "lora.safetensors"], base, tmp_path / out, **options)
    assert not (base / "baked").exists()


def list_files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_diffusers_loads_a_baked_pipeline_as_its_own_pipeline_with_the_lora_fused(tmp_path):
    """Plain, in shards, a snapshot of links with a variant, and where the variant is asked for."""
    from diffusers import StableDiffusionPipeline

    plain, shards, hub = (tmp_path / name for name in ("plain", "shards", "hub"))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipelines.save(plain))
    pipe.save_pretrained(shards, max_shard_size="20KB")
    (hub / "blobs").mkdir(parents=True)
    pipe.save_pretrained(plain, variant="fp16")
    (plain / "LICENSE.md").write_text("free")
    for left in ("bin", "bf16.safetensors.index.json", "safetensors.index.bf16.json"):
        (plain / "unet" / f"diffusion_pytorch_model.{left}").write_text("{}")
    for number, name in enumerate(sorted(list_files(plain))):
        place = hub / "snapshots" / ("0" * 40) / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(plain / name, hub / "blobs" / f"{number:064x}")
        place.symlink_to(hub / "blobs" / f"{number:064x}")
    lora = tiny_pipelines.write_lora_with_text(tmp_path / "lora.safetensors", pipe)
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert len(list((shards / "unet").glob("*.safetensors"))) > 1
    for base in (plain, shards, place.parents[1]):
        bake([lora], base, tmp_path / "baked")
        assert not any(path.is_symlink() for path in (tmp_path / "baked").rglob("*"))
        assert (tmp_path / "baked" / "LICENSE.md").exists() == (base != shards)
        assert not {"bin", "bf16"} & set(" ".join(list_files(tmp_path / "baked")).split("."))
        for variant in (None, "fp16") if base is plain else (None,):
            baked = StableDiffusionPipeline.from_pretrained(tmp_path / "baked", variant=variant)
            for name in ("unet", "text_encoder", "vae"):
                wanted, got = (getattr(x, name).state_dict() for x in (pipe, baked))
                assert wanted.keys() == got.keys()
                far = [key for key, x in wanted.items() if (got[key] - x).abs().max() > 1e-6]
                assert far == [], (base.name, variant)
        shutil.rmtree(tmp_path / "baked")


def test_a_link_that_leads_out_of_a_model_is_not_followed_into_the_copy(tmp_path):
    """Whoever publishes a baked model publishes no file of his own with it."""
    base, secret = mini.write_folder(tmp_path / "pipe" / "unet", {}).parent, tmp_path / "secret"
    weights = {f"{name}.weight": x.contiguous() for name, x in mini.source_weights().items()}
    (base / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    secret.write_text("mine")
    (base / "notes.txt").symlink_to(secret)
    (base / "unet" / "notes.txt").symlink_to(secret)
    for name in ("a", "b", "unet/a"):
        (base / name).symlink_to(base)
    (base / "other").mkdir()
    (base / "other" / "diary.txt").write_text("mine")
    save_file(weights, tmp_path / "elsewhere.safetensors")
    (base / "unet" / PLAIN).unlink()
    (base / "unet" / PLAIN).symlink_to(tmp_path / "elsewhere.safetensors")
    (tmp_path / "case").mkdir()
    bake([mini.write_case(tmp_path / "case")[0]], base, tmp_path / "baked")
    wanted = {"model_index.json", "unet/config.json", f"unet/{PLAIN}"}
    assert list_files(tmp_path / "baked") == wanted


def test_what_cannot_be_baked_is_refused_before_anything_is_written(tmp_path):
    lora, base, _, _ = make_case(tmp_path)
    out = tmp_path / "out.safetensors"
    codes = {f"{MODULE}.weight": torch.zeros(64, 48, dtype=torch.int8)}
    save_file(codes, tmp_path / "codes.safetensors")
    for error, given in (
        (InvalidOption, ([lora], load_file(base), out)),
        (ProLoRAError, ([lora], tmp_path / "codes.safetensors", out)),
        (OutputError, ([lora], base, base)),
        (OutputError, ([lora], base, tmp_path / "out.gguf")),
        (InvalidOption, ([], base, out)),
    ):
        with pytest.raises(error):
            bake(*given)
    for options in ({"strengths": [1.0, 2.0]}, {"out_rank": 4}, {"method": "balanced"}):
        with pytest.raises(InvalidOption):
            bake([lora], base, out, **options)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(OutputExists):
        bake([lora], base, out)
    assert out.read_text() == "mine"


def test_values_that_overflow_refuse_the_model(tmp_path):
    lora, base, _, _ = make_case(tmp_path, torch.float16)
    with pytest.raises(NonFiniteWeights, match="overflows"):
        bake([lora], base, tmp_path / "out.safetensors", strengths=[1e9])
    assert sorted(x.name for x in tmp_path.iterdir()) == ["base.safetensors", "lora.safetensors"]
