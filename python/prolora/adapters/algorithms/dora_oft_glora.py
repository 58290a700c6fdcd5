"""DoRA, OFT and GLoRA: updates that depend on the base weight.

ΔW = merged − W. DoRA rescales the merged weight to learned magnitudes, OFT rotates the weight,
GLoRA multiplies it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...core.lowrank import LowRank
from ...errors import ShapeMismatch
from . import lora_products as products
from .truncation import TruncatedUpdate, truncate_dense, truncate_product

Tensors = Mapping[str, Tensor]


def dora_update(weight: Tensor, delta: Tensor, tensors: Tensors, where: str) -> Tensor:
    """Computes ΔW = m·V/‖V‖ − W with V = W + δ.

    The norms run along the axis that m belongs to.

    Args:
        weight: W [out, in] or [out, in, kh, kw].
        delta: δ = scale·up·down, in the shape of W.
        tensors: `magnitude` (PEFT's and ai-toolkit's, of the output axis always) or `dora_scale`.
        where: for messages.

    Raises:
        ShapeMismatch: m fits neither axis, or both.
    """
    weight = weight.double()
    merged = weight + delta
    magnitudes, axis = magnitude_axis(tensors, tuple(weight.shape), where)
    others = [i for i in range(weight.dim()) if i != axis]
    norms = torch.linalg.vector_norm(merged, dim=others, keepdim=True)
    # A row that vanishes has no direction; LyCORIS and PEFT leave it at zero.
    scale = magnitudes.double().reshape(norms.shape) / norms.clamp_min(torch.finfo(torch.float).eps)
    update: Tensor = merged * scale - weight
    return update


def magnitude_axis(tensors: Tensors, shape: tuple[int, ...], where: str) -> tuple[Tensor, int]:
    """Returns a DoRA's magnitudes and their axis: 0 (output) or 1 (input).

    LyCORIS and OneTrainer write [out, 1] or [1, in] (with more ones on convolutions), old files
    mostly the latter; PEFT and ai-toolkit write [out], PEFT on convolutions [1, out, 1, 1].

    Raises:
        ShapeMismatch: another shape.
    """
    out, inputs = shape[:2]
    magnitudes = tensors["magnitude"] if "magnitude" in tensors else tensors["dora_scale"]
    sizes = tuple(magnitudes.shape)
    if "magnitude" in tensors or magnitudes.dim() == 1:
        if magnitudes.numel() == out and set(sizes) <= {1, out}:
            return magnitudes, 0
    elif sizes and sizes[0] == out == magnitudes.numel():
        return magnitudes, 0
    elif sizes[:2] == (1, inputs) and magnitudes.numel() == inputs:
        return magnitudes, 1
    raise ShapeMismatch(
        f"{where}: DoRA magnitudes of a weight {list(shape)} are not {list(magnitudes.shape)} but "
        f"[{out}, 1], [1, {inputs}] or [{out}]"
    )


def oft_update(weight: Tensor, tensors: Tensors) -> Tensor:
    """Computes ΔW = s·(RᵀW) − W with block-diagonal R.

    Its blocks are the Cayley transforms (I + Q)(I − Q)⁻¹. Q is the skew part of a block; `alpha`
    here bounds its norm (the constraint, per row of W), and s is the optional rescaling of rows.
    """
    blocks = tensors["oft_blocks"].double()
    count, size, _ = blocks.shape
    skew = blocks - blocks.mT
    limit = float(tensors["alpha"]) * count * size if "alpha" in tensors else 0.0
    norm = skew.norm() + 1e-8
    if 0 < limit < norm:
        skew = skew * (limit / norm)
    identity = torch.eye(size, dtype=torch.float64)
    # (I − Q)⁻¹ and I + Q commute; Q is skew, so I − Q is never singular.
    rotation = torch.linalg.solve(identity - skew, identity + skew)
    matrix = weight.double().flatten(1)
    rotated = (rotation.mT @ matrix.reshape(count, size, -1)).reshape(matrix.shape)
    if "rescale" in tensors:
        rotated = rotated * tensors["rescale"].double().reshape(-1, 1)
    update: Tensor = (rotated - matrix).reshape(weight.shape)
    return update


def glora_update(weight: Tensor, tensors: Tensors) -> LowRank:
    """Computes ΔW = W·a1·a2 + b1·b2 without its scale, as a product.

    On a convolution a1 and a2 act on the input channels, alike at every position of the kernel.
    """
    size = weight.shape[2:].numel()
    a1, a2 = (tensors[role].double().flatten(1) for role in ("a1", "a2"))
    same = torch.eye(size, dtype=torch.float64)
    left = weight.double().flatten(1) @ torch.kron(a1, same)
    parts = {"up": tensors["b1"], "down": tensors["b2"]}
    product = products.lora_product(parts | ({"mid": tensors["bm"]} if "bm" in tensors else {}))
    return LowRank(
        torch.cat([left, product.up.double()], 1),
        torch.cat([torch.kron(a2, same), product.down.double()], 0),
    )


def merged_update(
    algorithm: str, weight: Tensor, tensors: Tensors, scale: float, where: str, rank: int
) -> TruncatedUpdate:
    """Computes the update of a module whose ΔW depends on W, scale included.

    `algorithm` is one of `forms.ALGORITHM_NAMES`; with DoRA's magnitudes among the tensors (by
    role), what δ is. W is [out, in] or [out, in, kh, kw], `rank` the most columns of the result.

    Raises:
        ShapeMismatch: DoRA's magnitudes fit neither axis, or GLoRA's factors not the weight.
    """
    if algorithm == "oft":
        return truncate_dense(oft_update(weight, tensors).flatten(1), rank)
    if algorithm == "glora":
        channels = tensors["a1"].shape[0]
        if channels != weight.shape[1]:
            raise ShapeMismatch(
                f"{where}: a1 is for {channels} input channels, the base weight is "
                f"{list(weight.shape)}"
            )
        product = glora_update(weight, tensors)
        return truncate_product(LowRank(product.up * scale, product.down), rank)
    # δ in full: cutting it here would move the norms that the magnitudes are put on.
    delta = scale * products.dense_update(algorithm, tensors).reshape(weight.shape)
    return truncate_dense(dora_update(weight, delta, tensors, where).flatten(1), rank)
