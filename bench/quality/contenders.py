"""What the study compares: every way of moving a LoRA, as {target module: update}.

`prolora` and the copy are those of the library. This file has what only the study needs: the
paper's other projections, matched norms, extraction and CASA's arbitration.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from worlds import World, backbone

import prolora
from prolora import Basis, LowRank
from prolora.adapters import Adapter
from prolora.core.affinity import Affinity
from prolora.core.methods import Side
from prolora.core.verdict import PairVerdict, judge_pairs

Updates = dict[str, LowRank]


@dataclass
class Case:
    """One transfer: the same-shape modules of two bases and the source's updates for them."""

    source: dict[str, Tensor]  # weights [m, n] by the target's module name
    target: dict[str, Tensor]  # weights [m, n] by the target's module name
    updates: Updates  # the source LoRA's updates by the target's module name
    _bases: dict[tuple[str, float], tuple[Basis, Basis]] = field(default_factory=dict)

    def bases(self, energy: float) -> Iterator[tuple[str, Basis, Basis]]:
        """Module by module the two subspaces that hold a share of the energy."""
        for name, weight in self.target.items():
            key = (name, energy)
            if key not in self._bases:
                self._bases[key] = (
                    prolora.truncated_svd(self.source[name], energy),
                    prolora.truncated_svd(weight, energy),
                )
            yield (name, *self._bases[key])


def make_cases(
    world: World,
    arch: str,
    kind: str,
    bases: tuple[nn.Module, nn.Module],
    loras: dict[str, Updates],
) -> dict[str, Case]:
    """Adapter -> its Case; the bases are factorised once for all of them.

    Modules of equal shape are paired by the map that is known from how the target was made.
    """
    source, target = (dict(backbone(base).named_modules()) for base in bases)
    origins = {
        name: world.origin(arch, kind, name)
        for name in target
        if re.fullmatch(world.adapted[arch], name)
        and not world.is_new(arch, kind, f"{name}.weight")
    }
    pairs = {
        name: origin
        for name, origin in origins.items()
        if origin in source and source[origin].weight.shape == target[name].weight.shape
    }
    weights = (
        {name: source[origin].weight.data for name, origin in pairs.items()},
        {name: target[name].weight.data for name in pairs},
    )
    factorised: dict[tuple[str, float], tuple[Basis, Basis]] = {}
    return {
        adapter: Case(*weights, {name: lora[origin] for name, origin in pairs.items()}, factorised)
        for adapter, lora in loras.items()
    }


SPLITS: dict[str, Callable[[Side], Tensor]] = {
    # The paper's ablation: without the complement.
    "subspace": lambda side: side.within,
    # LoRA-X, eq. 3: what lies in the target's range.
    "lora-x": lambda side: side.within + (side.outside - side.without),
    # With the mixed blocks mapped as well: Σ_ab (P_t^a P_s^a) ΔW (Q_s^b Q_t^b) = L ΔW R.
    "blocks": lambda side: side.within + side.without,
}
"""Method -> what it makes of the rows of one factor."""


def project_otherwise(method: str, update: LowRank, source: Basis, target: Basis) -> LowRank:
    """ΔW_t = L(up) R(down) by one of SPLITS."""
    left = SPLITS[method](Side.of(update.up.mT, source.U, target.U))
    return LowRank(left.mT, SPLITS[method](Side.of(update.down, source.V, target.V)))


def make_projection(method: str, energy: float) -> Callable[[Case], Updates]:
    """A projection at a share of the energy."""

    def run(case: Case) -> Updates:
        moved = {}
        for name, source, target in case.bases(energy):
            update = case.updates[name]
            if method in SPLITS:
                moved[name] = project_otherwise(method, update, source, target)
            else:
                moved[name] = prolora.project(update, source, target)
        return moved

    return run


def match_norms(case: Case) -> Updates:
    """A copy in which every update has the share of its weight's norm that it had in the source.

    What loaders offer in 2026 as a strength for each layer.
    """
    return {
        name: LowRank(
            update.up * float(case.target[name].norm() / case.source[name].norm()), update.down
        )
        for name, update in case.updates.items()
    }


def extract_difference(case: Case) -> Updates:
    """The merged source less the target, cut to twice the LoRA's rank.

    Apply, subtract, extract: what users do with merging and extraction scripts. It holds the way
    back from the target to the source beside the LoRA.
    """
    moved = {}
    for name, update in case.updates.items():
        difference = case.source[name] + update.dense() - case.target[name]
        rank = min(2 * update.rank, *difference.shape)
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
        moved[name] = LowRank(u[:, :rank] * s[:rank], vh[:rank])
    return moved


def arbitrate(case: Case, gives_drift_back: bool = True) -> Updates:
    """CASA's spectral arbitration (arXiv 2605.01929), after its description; rank 4 r.

    In the coordinates of the source's full SVD, C_drift = Uᵀ(W_t − W_s)V and C_lora = UᵀΔWV.
    Singular directions that the LoRA couples (|C_lora[i, j]| > 0.5 |σ_i − σ_j|) form clusters; the
    half of them with the larger drift is dominant. Outside the dominant ones C_lora − C_drift is
    written, so that the target's drift gives way; inside C_lora, except where both agree in sign
    and matter most: there only what the larger of the two adds to the drift. Without giving the
    drift back it is C_lora outside too.
    """
    moved = {}
    for name, source in case.source.items():
        update = case.updates[name]
        u, s, vh = torch.linalg.svd(source.double(), full_matrices=True)
        drift = u.mT @ (case.target[name] - source).double() @ vh.mT
        lora = u.mT @ update.up.double() @ (update.down.double() @ vh.mT)
        square = source.shape[0] == source.shape[1]
        share = s.square().cumsum(0) / s.square().sum()
        k = int((share < 0.9).sum()) + 1 if square else len(s)
        cluster = _clusters(lora[:k, :k], s[:k])
        rows, columns = _dominant(drift.norm(dim=1), cluster), _dominant(drift.norm(dim=0), cluster)
        inside = torch.zeros_like(lora, dtype=torch.bool)
        inside[rows, :] = True
        inside[:, columns] = True
        core = torch.where(inside, lora, lora - drift) if gives_drift_back else lora
        agree = inside & (lora * drift > 0)
        score = (lora * drift).abs() * _cosine(lora, drift, cluster)
        if agree.any():
            strong = agree & (score > score[agree].quantile(0.85))
            larger = torch.where(lora.abs() >= drift.abs(), lora, drift)
            core = torch.where(strong, larger - drift, core)
        left, kept, right = torch.linalg.svd(core, full_matrices=False)
        r = min(4 * update.rank, len(kept))
        root = kept[:r].sqrt()
        moved[name] = LowRank(
            (u @ left[:, :r] * root).to(source.dtype),
            (root[:, None] * right[:r] @ vh).to(source.dtype),
        )
    return moved


def _clusters(lora: Tensor, s: Tensor) -> Tensor:
    """Connected components [k] of the directions that the LoRA couples more than their gap."""
    strength = lora.abs() / ((s[:, None] - s[None, :]).abs() + 1e-6)
    linked = (strength > 0.5) | (strength.mT > 0.5)
    label = torch.arange(len(s))
    while True:
        spread = torch.where(linked, label[None, :], len(s)).amin(1).minimum(label)
        if torch.equal(spread, label):
            return label
        label = spread


def _dominant(norms: Tensor, cluster: Tensor) -> Tensor:
    """The directions whose cluster drifts at least as much as the median cluster."""
    mean = torch.zeros(len(cluster), dtype=norms.dtype)
    count = torch.zeros(len(cluster), dtype=norms.dtype)
    mean.index_add_(0, cluster, norms[: len(cluster)])
    count.index_add_(0, cluster, torch.ones_like(norms[: len(cluster)]))
    mean = mean / count.clamp_min(1)
    return torch.nonzero(mean[cluster] >= mean[count > 0].quantile(0.5)).flatten()


def _cosine(lora: Tensor, drift: Tensor, cluster: Tensor) -> Tensor:
    """Cosine [m, n] between LoRA and drift on the rows of each row's cluster; 1 outside them."""
    weight = torch.ones(lora.shape[0], dtype=lora.dtype)
    for label in cluster.unique():
        rows = torch.nonzero(cluster == label).flatten()
        a, b = lora[rows].flatten(), drift[rows].flatten()
        weight[rows] = (a @ b / (a.norm() * b.norm()).clamp_min(1e-30)).abs()
    return weight[:, None].expand_as(lora)


def run_transfer(case: Case, **options: Any) -> Updates:
    """What the library's `transfer` writes; nothing where it refuses the pair as unrelated."""
    bases = (
        {f"{name}.weight": w for name, w in side.items()} for side in (case.source, case.target)
    )
    try:
        return prolora.transfer(Adapter(dict(case.updates)), *bases, **options).adapter.updates
    except prolora.errors.UnrelatedBases:
        return {}


def judge_bases(case: Case) -> PairVerdict:
    """What the weights of the pair say."""
    pairs = [(case.source[name], case.target[name]) for name in case.target]
    return judge_pairs(Affinity.of(*pair) for pair in pairs)


def scale_updates(updates: Updates, strength: float) -> Updates:
    return {name: LowRank(update.up * strength, update.down) for name, update in updates.items()}


STRENGTHS = (0.25, 0.4, 0.6, 0.8, 1.0, 1.25)

METHODS: dict[str, Callable[[Case], Updates]] = {
    "copy": lambda case: case.updates,
    "norm-matched": match_norms,
    "extracted": extract_difference,
    "casa": arbitrate,
    **{f"prolora {energy}": make_projection("prolora", energy) for energy in (0.9, 0.99)},
    **{f"{name} 0.9": make_projection(name, 0.9) for name in SPLITS},
    "auto": functools.partial(run_transfer, method="auto"),
}


def run_all(case: Case) -> Iterator[tuple[str, Updates]]:
    """Every row of the study: the copy at STRENGTHS, `auto` as it is, the others at strength 1."""
    for label, method in METHODS.items():
        updates = method(case)
        if label == "auto":
            yield label, updates
            continue
        for strength in STRENGTHS if label == "copy" else (1.0,):
            yield f"{label} @ {strength:g}", scale_updates(updates, strength)
