"""A fit in factors makes nothing of a weight's size, and computes what dense formulas give."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from diffusers import UNet2DConditionModel
from fitting import fit_models, predict, solve, teach
from small_diffusers import UNET
from test_probe import Denoiser
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prolora import LowRank, ProLoRAError
from prolora.fitting.models import in_float32
from prolora.fitting.sides import Call, output_of
from prolora.fitting.solver.joint_fit import JointProblem, start_factors
from prolora.fitting.solver.linearisation import ProbeBatch
from prolora.fitting.solver.spectra import JointCurvature, LeadingSpectrum
from prolora.fitting.updates import weight_of, with_lora

WIDE = 192


class Large(TorchDispatchMode):
    """Counts the living storages of at least a number of elements that operators made."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.alive, self.most, self.names = elements, set(), 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(tensor, Tensor) or func.is_view:
                continue
            storage = tensor.untyped_storage()
            if storage.nbytes() >= self.elements * tensor.element_size():
                self.names.add(str(func))
                key = object()
                self.alive.add(key)
                self.most = max(self.most, len(self.alive))
                weakref.finalize(storage, self.alive.discard, key)
        return result


def parts() -> tuple[nn.Module, list[str], list[ProbeBatch]]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDE, WIDE), nn.Tanh()) for _ in range(4)))
    model.requires_grad_(False)
    probes = teach(model, torch.randn(3, 20, WIDE), 0.1 * torch.randn(3, 20, WIDE))
    return model, [f"{i}.0" for i in range(4)], probes


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("start", [pytest.param("zero", marks=pytest.mark.slow), "copy"])
def test_no_tensor_of_a_weights_size_is_made_by_a_fit(start, adam):
    model, names, probes = parts()
    copied = {n: LowRank(torch.randn(WIDE, 3) / 50, torch.randn(3, WIDE) / 14) for n in names[:2]}
    with Large(WIDE * WIDE) as large:
        fit = solve(
            model, names, probes, 6, rank=4, start=copied if start == "copy" else {}, adam=adam
        )
    assert not large.names
    assert fit.history[-1] > fit.history[0]


def test_of_weights_in_half_precision_only_those_of_running_blocks_are_widened():
    torch.manual_seed(0)
    wide = {"block_out_channels": [8, 64], "norm_num_groups": 4, "cross_attention_dim": 8}
    model = UNet2DConditionModel(**(UNET | wide)).half().requires_grad_(False).eval()
    names = [n for n, m in model.named_modules() if n.endswith(("ff.net.0.proj", "ff.net.2"))]
    call = Call((torch.randn(1, 1, 8, 8), torch.tensor([500.0]), torch.randn(1, 3, 8)), {})
    most = {}
    with in_float32(model):
        probes = teach(model, call, 0.1 * torch.randn(1, 1, 8, 8))
        for can in (True, False):
            model._supports_gradient_checkpointing = can
            with Large(64 * 256) as large:
                solve(model, names, probes, 2)
            most[can] = large.most
    assert not model.is_gradient_checkpointing
    assert len(names) == 8 and most[False] > 16  # and convolutions are as large
    assert 0 < most[True] < most[False] / 2, most


@pytest.mark.slow
@pytest.mark.parametrize("start", ["zero", "copy"])
def test_no_tensor_of_a_weights_size_is_made_by_a_whole_fit(start):
    """Sampling, asking, fitting and judging run the LoRA beside the weights."""
    torch.manual_seed(0)
    source = Denoiser(2 * WIDE)
    target = copy.deepcopy(source)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    lora = {}
    for name in (f"blocks.{i}.{leaf}" for i in range(3) for leaf in ("up", "down")):
        m, n = source.get_submodule(name).weight.shape
        lora[name] = LowRank(torch.randn(m, 2) / 20, torch.randn(2, n) / 20)
    few = {"images": 4, "batch": 12, "probes": 24, "held_out": 24, "rank": 2}
    with Large(4 * WIDE * WIDE) as large:
        copied = {} if start == "zero" else lora
        result = fit_models(source, target, lora, copied, **few, force=True)
    assert not large.names
    assert result.report.start == start and result.updates.keys() == lora.keys()


class Padded(nn.Conv2d):
    """A convolution that pads what it reads itself, as those of videos do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (2, 0, 1, 0), value=0.5))


KINDS = {
    "linear": (lambda: nn.Linear(6, 4), (2, 3, 6)),
    "convolution": (lambda: nn.Conv2d(6, 4, 3, padding=1), (2, 6, 5, 7)),
    "grouped": (lambda: nn.Conv2d(6, 4, (3, 1), stride=2, dilation=2, groups=2), (2, 6, 9, 7)),
    "circular": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (2, 6, 5, 7)),
    "padded": (lambda: Padded(6, 4, 3), (2, 6, 5, 7)),
    "along time": (lambda: nn.Conv1d(6, 4, 3), (2, 6, 8)),
    "video": (lambda: nn.Conv3d(6, 4, (3, 1, 1)), (2, 6, 4, 3, 3)),
    "embedding": (lambda: nn.Embedding(6, 4), (2, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_lora_beside_the_weights_is_the_lora_in_them(kind, dtype):
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    model = nn.Sequential(make()).to(dtype).eval()
    x = torch.randint(6, shape) if kind == "embedding" else torch.randn(shape)
    weight = model[0].weight.detach().clone()
    m, n = weight.flatten(1).shape
    update = LowRank(torch.randn(m, 2), torch.randn(2, n))
    merged = copy.deepcopy(model).float()
    merged[0].weight.data += 0.5 * update.dense().reshape(weight.shape)
    with torch.no_grad(), in_float32(model):
        plain = model(x)
        with with_lora(model, {"0": update}, 0.5):
            beside = model(x)
        assert torch.equal(predict(model, x), plain)
    torch.testing.assert_close(beside, merged(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(model[0].weight, weight) and model[0].weight.dtype == dtype


def test_an_update_of_a_module_that_no_fit_can_change_is_refused_by_kind():
    model = nn.ModuleDict({"gate": nn.Bilinear(2, 2, 2), "turned": nn.ConvTranspose2d(4, 4, 1)})
    model.update({"grouped": nn.Conv2d(4, 4, 3, groups=2), "videos": nn.Conv3d(2, 2, 1)})
    update = LowRank(torch.zeros(4, 1), torch.zeros(1, 4))
    for name, module in model.items():
        words = f"{name} is a {type(module).__name__}; a fit changes"
        if name in ("grouped", "videos"):  # a LoRA may have them, and no fit changes them
            assert weight_of(model, name, any_kind=True) is module.weight
            with pytest.raises(ProLoRAError, match=words):
                weight_of(model, name)
            continue
        with pytest.raises(ProLoRAError, match=words), with_lora(model, {name: update}):
            pass


def rows(count: int, width: int) -> Tensor:
    scales = torch.logspace(0, -2, width)
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count)) * scales


@pytest.mark.parametrize("power", [-1, -0.5, 0.5, 1])
def test_a_damped_spectrum_is_the_dense_power_where_all_of_it_is_kept(power):
    x = rows(200, 12)
    spectrum = LeadingSpectrum()
    for part in x.split(50):
        spectrum.add(part, torch.Generator())
    gram = (x.mT @ x).double()
    shifted = gram + 0.3 * gram.diagonal().mean() * torch.eye(12)
    values, vectors = torch.linalg.eigh(shifted)
    dense = (vectors * values**power) @ vectors.mT
    y = rows(5, 12)
    got = spectrum.damp(0.3).multiply(y, power)
    torch.testing.assert_close(got.double(), y.double() @ dense, rtol=1e-4, atol=1e-6)


def test_the_natural_step_is_the_dense_one_within_updates_of_the_rank():
    """The change of the update is nearest to the dense direction in the metric of JᵀJ."""
    generator = torch.Generator().manual_seed(0)
    m, n, r = 10, 12, 3
    x, g = rows(200, n), rows(300, m)
    curvature = JointCurvature(0.01, generator)
    curvature.add_reads("a", x)
    curvature.add_writes("a", g)
    up, down, full = (torch.randn(s, generator=generator) for s in ((m, r), (r, n), (m, n)))
    step = curvature.solve({"a": (up, down)}, {"a": (full @ down.mT, up.mT @ full)})["a"]
    R, S = ((y.mT @ y).double() for y in (x, g))
    R, S = (F + 0.1 * F.diagonal().mean() * torch.eye(len(F)) for F in (R, S))
    change = step[0].double() @ down.double() + up.double() @ step[1].double()
    dense = 200 * torch.linalg.solve(S, full.double()) @ torch.linalg.inv(R)
    left = S @ (change - dense) @ R  # orthogonal to every change within the rank
    assert (left @ down.double().mT).norm() < 1e-2 * (S @ dense @ R @ down.double().mT).norm()
    assert (up.double().mT @ left).norm() < 1e-2 * (up.double().mT @ S @ dense @ R).norm()


def test_a_copy_to_start_from_is_itself_at_a_higher_rank_and_its_best_part_at_a_lower():
    model, names, _ = parts()
    copied = LowRank(torch.randn(WIDE, 3), torch.randn(3, WIDE))
    for rank in (2, 3, 7):
        problem = JointProblem(model, names, output_of, list, 1, 1.0, rank)
        factors = start_factors(problem, {names[0]: copied})
        up, down = factors[names[0]]
        assert up.shape == (WIDE, rank)
        expected = copied.truncate(rank).dense() if rank < 3 else copied.dense()
        torch.testing.assert_close(up @ down, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(down @ down.mT, torch.eye(rank), atol=1e-5, rtol=1e-5)
        assert not factors[names[1]][0].any()


def test_a_model_that_computes_blocks_again_takes_the_same_steps():
    torch.manual_seed(0)
    model = UNet2DConditionModel(**UNET).requires_grad_(False)
    names = [n for n, _ in model.named_modules() if n.endswith(("to_v", "ff.net.2"))]
    call = Call((torch.randn(2, 1, 8, 8), torch.tensor([500.0, 20.0]), torch.randn(2, 3, 8)), {})
    probes, histories = teach(model, call, 0.1 * torch.randn(2, 1, 8, 8)), []
    for can in (True, False):
        model._supports_gradient_checkpointing = can
        histories.append(solve(model, names, probes, 4).history)
    assert histories[0] == pytest.approx(histories[1], abs=1e-4)
    assert histories[0][-1] > histories[0][0]
