"""The network of the two terrain models as a torch module, with the weights of their ONNX files.

Written from the graph in the files: a UNet of the ADM kind (ResBlocks whose norms are scaled and
shifted by the time step, five of them a level, up and down by ResBlocks too, attention from a
quarter of the size down) inside the preconditioning of consistency models. `python network.py
FILE.onnx` compares it with onnxruntime.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

SIDE, GROUPS, HEAD = 128, 32, 32
CHANNELS, BLOCKS, WIDTHS, EMBEDDING = 32, 4, (32, 32, 64, 96, 128), 128
WITH_ATTENTION = (2, 3, 4)  # levels
SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5


class ResBlock(nn.Module):
    """Two convolutions; `resize` is 2 to double the size, 0.5 to halve it, 1 to keep it."""

    def __init__(self, inputs: int, outputs: int, resize: float = 1) -> None:
        super().__init__()
        self.resize = resize
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(EMBEDDING, 2 * outputs))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, outputs),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        if inputs != outputs:
            self.skip_connection = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        hidden = self.in_layers[2](self._resize(self.in_layers[1](self.in_layers[0](x))))
        scale, shift = self.emb_layers(emb)[..., None, None].chunk(2, dim=1)
        hidden = self.out_layers[0](hidden) * (1 + scale) + shift
        hidden = self.out_layers[3](self.out_layers[1](hidden))
        x = self._resize(x)
        return (self.skip_connection(x) if hasattr(self, "skip_connection") else x) + hidden

    def _resize(self, x: Tensor) -> Tensor:
        if self.resize == 1:
            return x
        if self.resize < 1:
            return functional.avg_pool2d(x, 2)
        return functional.interpolate(x, scale_factor=2.0, mode="nearest")


class Attention(nn.Module):
    """Attention between all places; `qkv` holds the queries, keys and values of all heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        batch, width, *size = x.shape
        q, k, v = (
            part.reshape(batch, width // HEAD, HEAD, -1).mT
            for part in self.qkv(self.norm(x)).chunk(3, dim=1)
        )
        out = functional.scaled_dot_product_attention(q, k, v).mT.reshape(batch, width, *size)
        return x + self.proj_out(out)


class Network(nn.Module):
    """(noised heightfields [b, 1, 128, 128], σ [b], difficulty [b] in 0..1) -> without noise."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = _embed(CHANNELS)
        self.label_emb = _embed(1)
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(1, CHANNELS, 3, padding=1)])])
        width, kept = CHANNELS, [CHANNELS]
        for level, wide in enumerate(WIDTHS):
            for _ in range(BLOCKS):
                self.input_blocks.append(_layers(level, width, wide))
                kept.append(width := wide)
            if level + 1 < len(WIDTHS):
                self.input_blocks.append(nn.ModuleList([ResBlock(width, width, 0.5)]))
                kept.append(width)
        self.middle_block = nn.ModuleList(
            [ResBlock(width, width), Attention(width), ResBlock(width, width)]
        )
        self.output_blocks = nn.ModuleList()
        for level, wide in reversed(list(enumerate(WIDTHS))):
            for number in range(BLOCKS + 1):
                layers = _layers(level, width + kept.pop(), wide)
                width = wide
                if number == BLOCKS and level:
                    layers.append(ResBlock(width, width, 2))
                self.output_blocks.append(layers)
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1)
        )

    def forward(self, noised: Tensor, sigma: Tensor, difficulty: Tensor) -> Tensor:
        """The estimate; not clipped to −1..1, as the ONNX graph does at its end."""
        above = sigma - SIGMA_MIN
        root = (sigma.square() + SIGMA_DATA**2).sqrt()
        skip = (SIGMA_DATA**2 / (above.square() + SIGMA_DATA**2))[:, None, None, None]
        out = (above * SIGMA_DATA / root)[:, None, None, None]
        inner = self.run_unet(noised / root[:, None, None, None], 250 * sigma.log(), difficulty)
        return skip * noised + out * inner

    def run_unet(self, x: Tensor, time: Tensor, difficulty: Tensor) -> Tensor:
        half = CHANNELS // 2
        steps = torch.arange(half, dtype=torch.float32, device=x.device) / half
        angles = time[:, None] * torch.exp(-math.log(10000) * steps)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        emb = emb + self.label_emb(difficulty[:, None])
        kept = [x := self.input_blocks[0][0](x)]
        for layers in self.input_blocks[1:]:
            for layer in layers:
                x = layer(x, emb)
            kept.append(x)
        for layer in self.middle_block:
            x = layer(x, emb)
        for layers in self.output_blocks:
            x = torch.cat([x, kept.pop()], dim=1)
            for layer in layers:
                x = layer(x, emb)
        return self.out(x)


def _embed(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))


def _layers(level: int, inputs: int, outputs: int) -> nn.ModuleList:
    """A ResBlock, and attention where the level has it."""
    layers = nn.ModuleList([ResBlock(inputs, outputs)])
    if level in WITH_ATTENTION:
        layers.append(Attention(outputs))
    return layers


def load_network(path: Path) -> Network:
    """The network with the weights of an ONNX file.

    Weights of convolutions and linear layers have their names there. The exporters folded the norms
    into a product and a sum without names, which stand in the order in which they run.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    values = {
        one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer
    }
    for node in graph.node:
        turned = any(one.name == "transB" and one.i for one in node.attribute)
        if node.op_type in ("MatMul", "Gemm") and not turned and node.input[1] in values:
            raise ValueError(f"{path}: {node.input[1]} is stored [in, out], which is not read")
    network = Network()
    norms: list[nn.GroupNorm] = []
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda module, *_: norms.append(module))
    with torch.no_grad():
        network(torch.zeros(1, 1, SIDE, SIDE), torch.ones(1), torch.zeros(1))
    for module in network.modules():
        module._forward_hooks.clear()
    state = {}
    for name, value in values.items():
        root, _, rest = name.partition(".")
        if root in ("model", "network"):
            state[rest] = value
    names = {module: name for name, module in network.named_modules()}
    for module, (scale, shift) in zip(norms, _list_norms(graph, values), strict=True):
        state[f"{names[module]}.weight"] = scale.flatten()
        state[f"{names[module]}.bias"] = shift.flatten()
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def _list_norms(graph, values: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(product, sum) behind each normalisation, in the order of the graph."""
    users: dict[str, list] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def follow(node, kind: str):
        return next(user for user in users[node.output[0]] if user.op_type == kind)

    affine = []
    for node in graph.node:
        if node.op_type == "InstanceNormalization":
            product = follow(follow(node, "Reshape"), "Mul")
            total = follow(product, "Add")
            scale, shift = (
                next(values[name] for name in one.input if name in values)
                for one in (product, total)
            )
            affine.append((scale, shift))
    return affine


def compare_with_runtime(path: Path, count: int = 4) -> float:
    """The worst difference from onnxruntime over random inputs at σ from the least to the most."""
    import onnxruntime

    generator = torch.Generator().manual_seed(0)
    sigma = torch.logspace(math.log10(SIGMA_MIN), math.log10(SIGMA_MAX), count)
    noise = torch.randn(count, 1, SIDE, SIDE, generator=generator)
    inputs = {
        "noisy": 0.5 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
        + noise * sigma[:, None, None, None],
        "sigma": sigma,
        "difficulty": torch.linspace(0, 1, count),
    }
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    theirs = session.run(["denoised"], {name: value.numpy() for name, value in inputs.items()})[0]
    with torch.no_grad():
        ours = load_network(path)(*inputs.values())
    # Both clip: 0.4.1 within its graph as 0.4.2 does.
    return float((ours.clamp(-1, 1) - torch.from_numpy(theirs)).abs().max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="ONNX files of the two wheels")
    for file in parser.parse_args().files:
        worst = compare_with_runtime(file)
        print(f"{file}: {worst:.1e}")
        if worst > 1e-5:
            raise SystemExit("the torch module is not the network in the file")
