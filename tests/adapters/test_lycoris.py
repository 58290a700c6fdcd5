"""LoCon, Tucker, LoHa, LoKr, full, GLoRA, diag-OFT and DoRA against LyCORIS and PEFT."""

import itertools
import math

import pytest
import torch
from diagonal import pair_up
from lora_files import random, relative_error, save, tiny_unet
from spectra import planted
from torch import nn

import prolora
from prolora.adapters.algorithms import truncation
from prolora.errors import NonFiniteWeights, ShapeMismatch, UnsupportedFormat

LINEAR = "mid_block.attentions.0.proj_in"
CONV = "down_blocks.0.resnets.0.conv1"
ALPHAS = {"absent": None, "rank": 4.0, "half the rank": 2.0, "rank-stabilised": 4 * 4**0.5}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SCALED = list(itertools.product(ALPHAS.values(), DTYPES))

# LyCORIS' name, its options, and the layer it goes on.
KINDS = {
    "locon": ("LoConModule", {}, CONV),
    "tucker": ("LoConModule", {"use_tucker": True}, CONV),
    "loha": ("LohaModule", {}, LINEAR),
    "loha on a convolution": ("LohaModule", {}, CONV),
    "loha with cores": ("LohaModule", {"use_tucker": True}, CONV),
    "lokr": ("LokrModule", {"factor": 4}, LINEAR),
    "lokr, both factored": ("LokrModule", {"factor": 12, "decompose_both": True}, LINEAR),
    "lokr, none factored": ("LokrModule", {"full_matrix": True}, LINEAR),
    "lokr on a convolution": ("LokrModule", {"factor": 2}, CONV),
    "lokr with a core": ("LokrModule", {"factor": 2, "use_tucker": True}, CONV),
    "full": ("FullModule", {}, LINEAR),
    "full on a convolution": ("FullModule", {}, CONV),
    "glora": ("GLoRAModule", {}, LINEAR),
    "glora on a convolution": ("GLoRAModule", {}, CONV),
    "oft": ("DiagOFTModule", {"constraint": 0}, LINEAR),
    "oft, constrained": ("DiagOFTModule", {"constraint": 2.0**-10}, LINEAR),
    "oft, rescaled": ("DiagOFTModule", {"constraint": 0, "rescaled": True}, CONV),
}
STEM = "lora_unet_" + LINEAR.replace(".", "_")
DORA = [kind for kind in KINDS if kind.startswith(("locon", "tucker", "loha", "lokr"))]


def kind_of(kind):
    """What prolora calls a kind of update."""
    return kind.partition(" ")[0].strip(",")


def layer(name):
    """A layer with float32 weights, alike at every call."""
    torch.manual_seed(1)
    if name == LINEAR:
        return nn.Linear(36, 48, bias=False)
    return nn.Conv2d(16, 32, 3, padding=1, bias=False)


def trained(kind, alpha=4.0, dtype=torch.float32, rank=4, **options):
    """(LyCORIS module after some training, its layer, the tensors of its file)."""
    from lycoris import modules

    name, fixed, where = KINDS[kind]
    base = layer(where)
    options = fixed | options
    module = getattr(modules, name)(
        "lora", base, 1.0, rank, alpha if alpha is not None else rank, **options
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "org_module" not in name:
                size = 0.3 if name != "dora_scale" else 0.1
                noise = size * torch.randn(parameter.shape, generator=generator)
                parameter.copy_((parameter + noise if "scale" in name else noise).to(dtype))
    if kind.startswith("full"):
        parts = {"diff": module.weight}  # custom_state_dict is for modules that were applied
    else:
        parts = module.custom_state_dict() or module.state_dict()
    stem = "lora_unet_" + where.replace(".", "_")
    tensors = {
        f"{stem}.{key}": value.detach().to(dtype).contiguous() for key, value in parts.items()
    }
    if alpha is None:
        tensors.pop(f"{stem}.alpha", None)
    return module, base, tensors


def effect(module, base):
    """ΔW as the layer applies it: LyCORIS' forward on unit inputs, minus the layer's own."""
    shape = base.weight.shape
    with torch.no_grad():
        if isinstance(base, nn.Linear):
            inputs = torch.eye(shape[1])
            return (module(inputs) - base(inputs)).mT
        inputs = torch.zeros(shape[1] * 9, shape[1], 3, 3)
        for i in range(shape[1]):
            for place in range(9):
                inputs[i * 9 + place, i, place // 3, place % 3] = 1
        found = module(inputs) - base(inputs)
        # The middle output sees the whole input, each input one weight of the kernel.
        return found[:, :, 1, 1].mT


def read(tensors, base, where):
    return prolora.convert(tensors, {where: base.weight.detach()})


@pytest.mark.parametrize(("kind", "scaled"), pair_up(KINDS, SCALED))
def test_an_update_is_what_the_layer_of_lycoris_does(kind, scaled):
    alpha, dtype = scaled
    if kind.startswith("oft"):
        alpha = 4.0  # a constraint, and no scale
    module, base, tensors = trained(kind, alpha, dtype)
    where = KINDS[kind][2]
    made = read(tensors, base, where)
    adapter = made.adapter
    assert list(adapter.updates) == [where] and made.report.left_out == {}
    assert adapter.kernels == ({where: (3, 3)} if where == CONV else {})
    assert adapter.kept_energy == {} and not made.report.unread
    assert adapter.with_updates({}).kernels == {}
    # Merging and subtracting in float32, as LyCORIS does, leaves no more than this.
    rounding = 2e-6 * max(1.0, (base.weight.norm() / effect(module, base).norm()).item())
    assert relative_error(adapter.updates[where].dense(), effect(module, base)) < rounding
    # Headers alone report the same: kind, shape and kernel.
    checked = prolora.check(tensors, base={where: base.weight.detach()})
    assert checked.algorithms == {made.report.modules[0].reason: 1} == {kind_of(kind): 1}
    assert checked.base_match.answer == "fits"


@pytest.mark.parametrize(
    "kind",
    ["locon", "tucker", "loha", "loha with cores", "lokr", "lokr with a core", "glora"],
)
def test_a_scalar_that_was_not_folded_into_the_factors_counts(kind):
    """`use_scalar` trains one; LyCORIS folds it in when it saves, other savers may not."""
    module, base, _ = trained(kind, 2.0, use_scalar=True)
    with torch.no_grad():
        module.scalar.fill_(0.7)
    where = KINDS[kind][2]
    stem = "lora_unet_" + where.replace(".", "_")
    parameters = {key: value for key, value in module.named_parameters() if "org" not in key}
    plain = {f"{stem}.{key}": value.detach() for key, value in parameters.items()}
    plain[f"{stem}.alpha"] = torch.tensor(2.0)
    assert f"{stem}.scalar" in plain
    folded = {f"{stem}.{key}": value.detach() for key, value in module.state_dict().items()}
    wanted = effect(module, base)
    for tensors in (plain, folded):
        update = read(tensors, base, where).adapter.updates[where]
        assert relative_error(update.dense(), wanted) < 1e-5


@pytest.mark.parametrize("on_output", [True, False], ids=["[out, 1]", "[1, in]"])
@pytest.mark.parametrize(
    ("kind", "alpha", "dtype"),
    [
        *((kind, 2.0, torch.float32) for kind in DORA),
        *(("locon", None, torch.float16), ("locon", ALPHAS["rank-stabilised"], torch.bfloat16)),
    ],
)
def test_a_dora_is_what_the_layer_of_lycoris_does_on_either_axis(kind, alpha, dtype, on_output):
    module, base, tensors = trained(kind, alpha, dtype, weight_decompose=True, wd_on_out=on_output)
    where = KINDS[kind][2]
    made = read(tensors, base, where)
    assert made.report.modules[0].reason.endswith("+dora")
    assert relative_error(made.adapter.updates[where].dense(), effect(module, base)) < 2e-6


CORES = {f"hada_w{i}_{x}": (2, 6) if x == "a" else (2, 4) for i in "12" for x in "ab"}
CORES |= {"hada_t1": (2, 2, 3, 1), "hada_t2": (2, 2, 3, 1)}
FLAT_LOHA = {f"hada_w{i}_{x}": (6, 2) if x == "a" else (2, 36) for i in "12" for x in "ab"}
FLAT_LOKR = {"lokr_w1": (2, 4), "lokr_w2": (3, 9)}
FLAT_LORA = {"lora_up.weight": (6, 2), "lora_down.weight": (2, 36)}


@pytest.mark.parametrize(
    ("parts", "module", "kernel"),
    [
        (FLAT_LOHA, CONV, (3, 3)),
        (FLAT_LOKR, CONV, (3, 3)),
        (FLAT_LOHA, LINEAR, None),  # 36 inputs may be 4 channels of 3×3
        (FLAT_LOKR, LINEAR, None),
        (FLAT_LOKR | {"lokr_w2": (3, 10)}, CONV, None),  # and 40 none
        (FLAT_LORA, CONV, None),  # a 1×1 convolution as a matrix
        (CORES, CONV, (3, 1)),  # the core's own shape, whatever the name
        (CORES, LINEAR, (3, 1)),
    ],
)
def test_only_flat_products_on_what_is_called_a_convolution_have_a_kernel_by_name(
    parts, module, kernel
):
    stem = "lora_unet_" + module.replace(".", "_")
    adapter = prolora.convert({f"{stem}.{k}": torch.ones(s) for k, s in parts.items()}).adapter
    assert adapter.kernels == ({module: kernel} if kernel else {})


def test_a_dora_without_its_base_is_refused_and_one_of_a_text_encoder_is_left_out():
    _, base, tensors = trained("locon", weight_decompose=True)
    with pytest.raises(UnsupportedFormat, match=rf"update of {CONV} is rescaled .*give the base"):
        prolora.convert(tensors)
    stem = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    parts = {"lora_up.weight": (6, 2), "lora_down.weight": (2, 5), "dora_scale": (6, 1)}
    tensors |= {f"{stem}.{role}": torch.ones(shape) for role, shape in parts.items()}
    made = read(tensors, base, CONV)
    name = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    (row,) = (row for row in made.report.modules if not row.target)
    assert list(made.adapter.updates) == [CONV] and row.source == name and "DoRA" in row.reason
    weights = {CONV: base.weight.detach()}
    moved = prolora.transfer(tensors, weights, weights, method="copy", again=True)
    assert name in {row.source for row in moved.report.modules if "DoRA" in row.reason}
    alone = {key: tensor for key, tensor in tensors.items() if key.startswith(stem)}
    with pytest.raises(UnsupportedFormat, match=f"nothing of it can be read; {name}"):
        prolora.convert(alone, weights)


def test_a_base_without_the_module_of_another_shape_or_with_nan_is_refused():
    _, base, tensors = trained("glora")
    weights = {"conv_in": torch.ones(2, 2), LINEAR: base.weight.detach()}
    for known, said in ((None, "give the base model that it was"), (weights, "base does not")):
        with pytest.raises(UnsupportedFormat, match=f"{LINEAR}.*{said}"):
            prolora.convert(tensors, known and {"conv_in": known["conv_in"]})
    with pytest.raises(ShapeMismatch, match=LINEAR):
        prolora.convert(tensors, weights | {LINEAR: torch.ones(48, 5)})
    weights[LINEAR][3, 4] = math.nan
    with pytest.raises(NonFiniteWeights, match=LINEAR):
        prolora.convert(tensors, weights)


@pytest.mark.parametrize("shape", [(2, 1), (48,), (1, 36), (48, 1), (1, 48), (36, 1), (36,), ()])
def test_magnitudes_belong_to_the_axis_their_shape_says_or_are_refused(shape):
    parts = {"lora_up.weight": torch.zeros(48, 2), "lora_down.weight": torch.zeros(2, 36)}
    parts |= {"dora_scale": torch.ones(shape)}
    tensors = {f"{STEM}.{role}": x for role, x in parts.items()}
    base, axes = layer(LINEAR), {(48,): 1, (48, 1): 1, (1, 36): 0}
    if shape not in axes:
        with pytest.raises(ShapeMismatch, match=r"DoRA magnitudes of a weight \[48, 36\] are not"):
            read(tensors, base, LINEAR)
        return
    weight = base.weight.detach()
    wanted = weight / weight.norm(dim=axes[shape], keepdim=True) - weight
    update = read(tensors, base, LINEAR).adapter.updates[LINEAR]
    assert relative_error(update.dense(), wanted) < 1e-6


MIXED = dict(rank_pattern={"proj_in": 2}, alpha_pattern={"conv1": 7.5})
OF_PEFT = {
    "DoRA, rank-stabilised": ("Lora", dict(lora_alpha=6, use_rslora=True, use_dora=True)),
    "DoRA, mixed": ("Lora", dict(lora_alpha=3, use_dora=True, **MIXED)),
    "LoHa, mixed": ("LoHa", dict(alpha=3, use_effective_conv2d=False, **MIXED)),
    "LoHa with cores": ("LoHa", dict(alpha=4, use_effective_conv2d=True)),
    "LoKr, mixed": ("LoKr", dict(alpha=3, use_effective_conv2d=False, **MIXED)),
    "LoKr with cores": ("LoKr", dict(alpha=4, use_effective_conv2d=True)),
}


@pytest.mark.parametrize("kind", OF_PEFT)
def test_a_folder_of_peft_is_what_its_merge_adds(tmp_path, kind):
    import peft

    method, options = OF_PEFT[kind]
    targets = [LINEAR, "down_blocks.1.resnets.0.conv1", "up_blocks.0.upsamplers.0.conv"]
    unet = tiny_unet()
    weights = {name: unet.get_submodule(name).weight.detach().clone() for name in targets}
    init = "init_lora_weights" if method == "Lora" else "init_weights"
    config = getattr(peft, f"{method}Config")(
        r=4, target_modules=targets, **{init: False}, **options
    )
    model = peft.get_peft_model(unet, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)
    converted = prolora.convert(tmp_path, weights)
    merged = model.merge_and_unload()
    assert set(converted.adapter.updates) == set(targets)
    kinds = {"lora+dora", "locon+dora"} if method == "Lora" else {method.lower()}
    assert {row.reason for row in converted.report.modules} == kinds
    for name, update in converted.adapter.updates.items():
        wanted = merged.get_submodule(name).weight.detach().double() - weights[name].double()
        rounding = 2e-6 + 2e-7 * float(weights[name].norm() / wanted.norm())  # of the merge
        assert relative_error(update.dense().double(), wanted.flatten(1)) < rounding


def test_a_peft_dora_without_its_magnitudes_is_refused(tmp_path):
    stem = f"base_model.model.{LINEAR}"
    tensors = {
        f"{stem}.lora_A.weight": torch.ones(4, 36),
        f"{stem}.lora_B.weight": torch.ones(48, 4),
    }
    save(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4, "use_dora": true}')
    with pytest.raises(UnsupportedFormat, match=r"magnitudes of .* are missing"):
        prolora.convert(tmp_path, {LINEAR: torch.ones(48, 36)})


@pytest.mark.parametrize(
    ("shape", "dtype"), [((144, 160), torch.bfloat16), ((300, 320), torch.float16)]
)
def test_a_difference_has_its_rank_whatever_rounding_to_its_dtype_added(shape, dtype):
    exact = random(shape[0], 3, seed=8).double() @ random(3, shape[1], seed=9).double()
    adapter = prolora.convert({f"{STEM}.diff": exact.to(dtype)}).adapter
    update = adapter.updates[LINEAR]
    assert update.rank == 3
    assert relative_error(update.dense(), exact) < torch.finfo(dtype).eps
    noise = relative_error(exact.to(dtype).double(), exact)
    kept = adapter.kept_energy.get(LINEAR, 1.0)
    assert 1 - kept == pytest.approx(noise**2, rel=0.1, abs=1e-7)


@pytest.mark.parametrize("size", [40, 300], ids=["all singular values", "the leading ones"])
def test_a_weak_column_of_a_difference_is_kept_or_counted(size):
    for weak in (1e-4, 3e-3):
        delta, _, _ = planted(size, size + 20, torch.tensor([1.0, weak]))
        tensors = {f"{STEM}.diff": delta.float()}
        whole = prolora.convert(tensors).adapter
        assert whole.updates[LINEAR].rank == 2 and whole.kept_energy == {}
        assert relative_error(whole.updates[LINEAR].dense().double(), delta) < 1e-6
    cut = prolora.convert(tensors, out_rank=1)
    assert cut.adapter.updates[LINEAR].rank == 1
    assert 1 - cut.report.share_held == pytest.approx(weak**2, rel=0.05)


FAR_APART = planted(48, 36, torch.tensor([1.0, 2e-6]))[0].float()
LEFT, RIGHT, MIXED_UP = (torch.linalg.qr(random(m, 3, seed=m))[0] for m in (48, 36, 3))
STEEP_A = LEFT * torch.tensor([1.0, 2e-6, 1e-8]) @ MIXED_UP
STEEP_B = MIXED_UP.mT @ RIGHT.mT
CUT = {
    "lokr": ({"lokr_w1": torch.ones(1, 1), "lokr_w2": FAR_APART}, FAR_APART.double()),
    "loha": (
        {
            **{"hada_w1_a": STEEP_A, "hada_w1_b": STEEP_B},
            **{"hada_w2_a": torch.ones(48, 1), "hada_w2_b": torch.ones(1, 36)},
        },
        STEEP_A.double() @ STEEP_B.double(),
    ),
}


@pytest.mark.parametrize("kind", CUT)
def test_a_cut_is_exact_down_to_two_millionths(kind):
    """Squares of σ tell only the first five digits of σ₂ = 2e-6 σ₁."""
    parts, delta = CUT[kind]
    tensors = {f"{STEM}.{role}": part.contiguous() for role, part in parts.items()}
    update = prolora.convert(tensors, out_rank=2, dtype="float32").adapter.updates[LINEAR]
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    assert update.rank == 2
    for i in range(2):
        found = update.up[:, i, None].double() @ update.down[None, i].double()
        assert relative_error(found, s[i] * u[:, i, None] @ vt[None, i]) < 2e-6


def test_what_has_too_high_a_rank_is_cut_to_the_stated_energy_and_says_what_it_kept(monkeypatch):
    monkeypatch.setattr(truncation, "MAX_RANK", 8)
    left, right = (torch.linalg.qr(random(m, 24, seed=m))[0] for m in (40, 32))
    delta = left * 0.5 ** torch.arange(24) @ right.mT
    adapter = prolora.convert({f"{STEM}.diff": delta}).adapter
    update, kept = adapter.updates[LINEAR], adapter.kept_energy[LINEAR]
    assert update.rank == 5  # 1 − ¼⁵ ≥ 0.999 > 1 − ¼⁴
    assert kept == pytest.approx(1 - 0.25**5, abs=1e-6)
    assert relative_error(update.dense(), delta) == pytest.approx((1 - kept) ** 0.5, rel=1e-3)


@pytest.mark.parametrize(
    "extra",
    [
        *({"hada_w1_a": (48, 2)}, {"lokr_w1": (4, 4)}, {"diff": (48, 36)}, {"rescale": (48, 1)}),
        *({"oft_blocks": (4, 12, 12)}, {"bm.weight": (2, 2, 3, 3)}, {"lokr_t2": (2, 2, 3, 3)}),
    ],
)
def test_two_kinds_on_one_module_are_refused(extra):
    parts = {"lora_up.weight": (48, 2), "lora_down.weight": (2, 36)} | extra
    with pytest.raises(UnsupportedFormat, match=STEM):
        prolora.convert({f"{STEM}.{role}": torch.ones(shape) for role, shape in parts.items()})


def test_two_kinds_of_magnitudes_are_refused():
    """PEFT's `lora_magnitude_vector` and LyCORIS' `dora_scale` may belong to different axes."""
    parts = {"lora_up.weight": (48, 2), "lora_down.weight": (2, 36), "dora_scale": (48, 1)}
    parts["lora_magnitude_vector"] = (48,)
    tensors = {f"{STEM}.{role}": torch.ones(shape) for role, shape in parts.items()}
    with pytest.raises(UnsupportedFormat, match=r"\.lora_magnitude_vector does not go with"):
        prolora.convert(tensors, {LINEAR: layer(LINEAR).weight.detach()})


def test_a_boft_is_refused_by_name():
    with pytest.raises(UnsupportedFormat, match="BOFT"):
        prolora.convert({"lora_unet_conv_in.oft_blocks": torch.ones(2, 3, 4, 4)})


def product(m, r, n):
    return random(m, r, seed=m) @ random(r, n, seed=n)


FULL = product(300, 32, 320)
W1, W2 = random(16, 16), product(24, 8, 40)  # 16·24 columns in name, 16·8 in truth
A1, B1, A2 = random(400, 18), random(18, 500, seed=1), product(400, 4, 18)  # 18·18, 18·4 in truth
HIGH_IN_NAME = {
    "full": ({"diff": FULL}, FULL.double()),
    "lokr": ({"lokr_w1": W1, "lokr_w2": W2}, torch.kron(W1.double(), W2.double())),
    "loha": (
        {"hada_w1_a": A1, "hada_w1_b": B1, "hada_w2_a": A2, "hada_w2_b": B1.flip(1)},
        (A1.double() @ B1.double()) * (A2.double() @ B1.flip(1).double()),
    ),
}


@pytest.mark.parametrize("kind", HIGH_IN_NAME)
def test_a_rank_that_is_high_in_name_only_is_kept_exactly(kind):
    """Numerically at most 256, though the factors have more columns, or the matrix none."""
    parts, delta = HIGH_IN_NAME[kind]
    adapter = prolora.convert({f"{STEM}.{role}": x for role, x in parts.items()}).adapter
    assert adapter.kept_energy == {}
    assert relative_error(adapter.updates[LINEAR].dense().double(), delta) < 2e-6
