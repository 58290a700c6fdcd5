"""Rows and columns are found in trained weights too: a UNet, cut to three quarters of its width."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from spectra import related

from prolora.bases import open_base
from prolora.comparison.width_selection import WidthFinder

MODELS = Path(__file__).parents[2] / "examples" / "mini_family" / "weights"
KEPT = {32: 24, 48: 36, 128: 96, 192: 128}  # width -> what the student keeps of it
SKIPS = {  # inputs of the resnets on the way up: the stream, and what is concatenated to it
    "up_blocks.0": ((48, 48), (48, 48), (48, 32)),
    "up_blocks.1": ((48, 32), (32, 32), (32, 16)),
    "up_blocks.2": ((32, 16), (16, 16), (16, 16)),
}


class Student:
    """Which channels of a teacher a student keeps, by the side of a weight that they are on."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.spaces = {}

    def space(self, key, width):
        """What is kept of a stream, told by its width, or of a layer's inside, by its name."""
        if width not in KEPT:
            return torch.arange(width)
        if key not in self.spaces:
            order = torch.randperm(width, generator=self.generator)
            self.spaces[key] = order[: KEPT[width]].sort().values
        return self.spaces[key]

    def sides(self, name, shape):
        """(rows, columns) of a weight."""
        m, n = shape[:2]
        layer, _, leaf = name.removesuffix(".0").rpartition(".")
        rows, columns = self.space(m, m), None if ".resnets." in name else self.space(n, n)
        if ".attn" in name:
            return (
                (rows, self.space(layer, n))
                if leaf == "to_out"
                else (self.space(layer, m), columns)
            )
        if ".ff." in name:
            block = name.partition(".ff.")[0]
            if name.endswith("net.2"):
                return rows, self.space(block, n)
            gated = self.space(block, m // 2)
            return torch.cat([gated, gated + m // 2]), columns
        if ".resnets." not in name:
            return rows, columns
        inside = self.space(layer, m if leaf != "conv2" else n)
        stage, _, number = layer.partition(".resnets.")
        parts = (
            SKIPS.get(stage, ((n,),) * 9)[int(number)]
            if leaf in ("conv1", "conv_shortcut")
            else (n,)
        )
        starts = (0, parts[0])
        into = torch.cat([s + self.space(w, w) for s, w in zip(starts, parts, strict=False)])
        return {
            "conv1": (inside, into),
            "conv2": (rows, inside),
            "conv_shortcut": (rows, into),
            "time_emb_proj": (inside, into),
        }[leaf]


@pytest.mark.parametrize(
    "model, noise, least", [("source", 0.0, 301), ("source", 1e-2, 301), ("finetuned", 0.0, 290)]
)
def test_no_row_is_wrong_in_a_trained_unet_that_was_cut(model, noise, least):
    wide = load_file(MODELS / "source" / "diffusion_pytorch_model.safetensors")
    trained = load_file(MODELS / model / "diffusion_pytorch_model.safetensors")
    student, kept, narrow = Student(), {}, {}
    for seed, (key, weight) in enumerate(trained.items()):
        if key.endswith(".weight") and weight.dim() > 1:
            name = key.removesuffix(".weight")
            rows, columns = kept[name] = student.sides(name, weight.shape)
            part = weight.float()[rows][:, columns]
            narrow[key] = related(part, noise, seed) if noise else part
    source, target = open_base(wide), open_base(narrow)
    pairs = [(name, name) for name in kept if source.shapes[name] != target.shapes[name]]
    assert len(pairs) == 301
    found = WidthFinder(source, target).find(pairs, {name: name for name in kept})
    assert len(found) >= least
    for (name, _), selection in found.items():
        rows, columns = kept[name]
        assert torch.equal(selection.rows, rows) and torch.equal(selection.columns, columns), name
