"""Odd files that people ask about, and what every face of prolora says of them.

A row has the mark, the exit code and the beginning of the first line, which terminal, node and page
have in common.
"""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import fused_shapes, name_in_ldm, sparse_file
from safetensors.torch import save, save_file
from torch import Tensor

from prolora.architectures.layouts import load_layout

ROOT = Path(__file__).parents[2]
MAKER = runpy.run_path(str(ROOT / "docs/make_conformance.py"))
FAMILIES = {family.id: family for _, family, _, _ in MAKER["list_files"]()}
Content = dict[str, Tensor] | bytes


@dataclass(frozen=True)
class OddFile:
    """A file, what is asked about it, and what is said."""

    name: str
    make: Callable[[], Content]
    mark: str
    code: int
    first: str  # the beginning of the first line, without the mark
    metadata: dict[str, str] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)  # keywords of `check`

    def write(self, folder: Path) -> Path:
        """Writes the file."""
        path, content = folder / f"{self.name}.safetensors", self.make()
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            tensors = {key: tensor.contiguous() for key, tensor in content.items()}
            save_file(tensors, path, self.metadata or None)
        return path


def make_lora(family: str, format: str, kind: str = "lora") -> dict[str, Tensor]:
    """A small LoRA of a published model, with one module of every kind."""
    return MAKER["make_file"](FAMILIES[family], format, kind)


def make_updates(
    sizes: dict[str, tuple[int, int]], rank: int = 2, alpha: float | None = None
) -> dict[str, Tensor]:
    """A LoRA on modules under their names in the file."""
    tensors = {}
    for path, (out, inputs) in sizes.items():
        up, down = ("lora_up", "lora_down") if "lora_unet" in path else ("lora_B", "lora_A")
        tensors[f"{path}.{up}.weight"] = torch.full((out, rank), 0.01)
        tensors[f"{path}.{down}.weight"] = torch.full((rank, inputs), 0.01)
        if alpha is not None:
            tensors[f"{path}.alpha"] = torch.tensor(alpha)
    return tensors


def set_alphas(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The same with one alpha."""
    return {k: torch.tensor(alpha) if k.endswith(".alpha") else x for k, x in tensors.items()}


def read_page_script() -> str:
    """The Python of the page *What is this LoRA?*."""
    text = (ROOT / "docs/doctor/worker.js").read_text("utf-8")
    return re.search(r"const CHECK = `\n(.*?)\n`;", text, re.DOTALL)[1].replace("\\`", "`")


def check_on_page(path: Path, program: str = "") -> tuple[str, str]:
    """(mark, first line) as the page has them."""
    scope: dict[str, Any] = {}
    exec(read_page_script(), scope)
    found = json.loads(scope["check"](str(path), program))
    return found["mark"], found["headline"]


DOUBLE = "lora_unet_double_blocks_{}_img_attn_qkv"
SD15 = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{}"
SDXL = "lora_unet_input_blocks_4_1_transformer_blocks_{}_attn2_to_k"
FLUX = {DOUBLE.format(i): (9216, 3072) for i in range(2)}
TRANSFORMER = "transformer.{}_blocks.0.attn.to_q"
SMALL = {TRANSFORMER.format("transformer"): (96, 96)}
WORDS = {f"model.layers.{i}.self_attn.q_proj": (64, 64) for i in range(3)}
CHECKPOINT = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(320, 4, 3, 3)}


def make_mixed() -> Content:
    """Ranks 4 and 16 under one alpha, as prolora and kohya's resize write them."""
    small = make_updates({SD15.format("q"): (320, 320)}, 4, 16.0)
    return small | make_updates({SD15.format("v"): (320, 320)}, 16, 16.0)


def make_two_families() -> Content:
    """An update that only SD 1.5 has, and one that only SDXL has."""
    return make_updates({SD15.format("q"): (320, 320), SDXL.format(9): (1280, 2048)}, 4, 4.0)


def make_half() -> Content:
    """Only one factor of every update."""
    return {key: x for key, x in make_lora("flux", "comfy").items() if "lora_B" not in key}


def make_foreign() -> Content:
    """A module that no model has."""
    return make_lora("krea2", "diffusers") | make_updates({TRANSFORMER.format("odd"): (64, 64)})


def make_zero() -> Content:
    """Alphas of 0."""
    return set_alphas(make_lora("sdxl", "kohya"), 0.0)


def make_beside(role: str, value: Tensor) -> Content:
    """A further tensor beside an update."""
    return make_updates(FLUX, 4, 4.0) | {f"{DOUBLE.format(0)}.{role}": value}


FLUX2, NAN = partial(make_lora, "flux2", "comfy"), torch.full((9216,), torch.nan)
SEVERAL, NO_FAMILY = "a LoRA for FLUX.1, FLUX.2, Chroma", "a LoRA for a model of no known family"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0"


def write_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Three LoRAs and four models: a file of the authors', ComfyUI's, diffusers' and fp8."""
    sd15, sdxl = (load_layout(size).shapes for size in ("sd15", "sdxl"))
    flux = fused_shapes(load_layout("flux1-dev").shapes, "flux1-dev")
    models = {
        "sd15": ({name_in_ldm(name, sd15): shape for name, shape in sd15.items()}, "F16"),
        "sdxl": (sdxl, "BF16"),
        "flux": (flux, "F8_E4M3"),
        "dev": (load_layout("flux1-dev").shapes, "F32"),
    }
    start = {"sd15": "model.diffusion_model.", "flux": "model.diffusion_model."}
    bases = [
        sparse_file(
            folder / f"{name}.safetensors",
            {f"{start.get(name, '')}{key}.weight": shape for key, shape in shapes.items()},
            dtype,
        )
        for name, (shapes, dtype) in models.items()
    ]
    loras = [folder / f"{family}-lora.safetensors" for family in ("sd15", "sdxl", "flux")]
    kinds = (("sd15", "kohya", "dora"), ("sdxl", "kohya", "lokr"), ("flux", "comfy", "lora"))
    for path, kind in zip(loras, kinds, strict=True):
        save_file(make_lora(*kind), path)
    return [(lora, base) for lora in loras for base in bases]


ODD_FILES = [
    OddFile("empty", lambda: b"", "✖", 2, "empty file; download it again"),
    OddFile("cut", lambda: save(make_lora("flux", "kohya"))[:-5], "✖", 2, "cut off: "),
    OddFile("page", lambda: b"<!DOCTYPE html><html>" * 9, "✖", 2, "a web page, not a model: "),
    OddFile("lfs", lambda: LFS, "✖", 2, "a pointer of Git LFS, not the file itself; "),
    OddFile("zip", lambda: b"PK\x03\x04" + bytes(99), "✖", 2, "an archive; unpack it, and give "),
    OddFile("pickle", lambda: b"\x80\x02}q\x00.", "✖", 2, "a pickle checkpoint in the old format"),
    OddFile(
        "embedding", lambda: {"emb_params": torch.ones(2, 768)}, "✖", 2, "a textual-inversion embed"
    ),
    OddFile("half", make_half, "✖", 2, "diffusion_model."),
    OddFile("checkpoint", lambda: CHECKPOINT, "✔", 0, "a base model of no known family"),
    OddFile("words", lambda: make_updates(WORDS), "✖", 2, "it is a language model's, and"),
    OddFile("several", lambda: make_updates(FLUX, 4, 4.0), "✔", 0, SEVERAL),
    OddFile("foreign", make_foreign, "⚠", 3, "1 of 31 modules are not in Krea 2, the first odd_"),
    OddFile("mixed", make_mixed, "✔", 0, "a LoRA for Stable Diffusion 1.5"),
    OddFile("alpha_0", make_zero, "⚠", 3, "Alpha is 0: ComfyUI, A1111 and diffusers make nothing"),
    OddFile("alpha_0_for", make_zero, "✖", 3, "Alpha is 0: ", asked={"program": "comfyui"}),
    OddFile("alpha_1", lambda: make_updates(FLUX, 128, 1.0), "✔", 0, SEVERAL),
    OddFile(
        "lost", lambda: make_updates(FLUX, 4), "⚠", 3, "It acts 4× as", {"ss_network_alpha": "1"}
    ),
    OddFile("two_families", make_two_families, "⚠", 3, "1 of 2 modules are not in Stable Diff"),
    OddFile("sizes", lambda: make_updates(SMALL), "⚠", 3, NO_FAMILY),
    OddFile("none_reads", FLUX2, "✖", 3, "diffusers reads nothing", asked={"program": "diffusers"}),
    OddFile("not_tried", FLUX2, "⚠", 3, "A1111 was not tried with", asked={"program": "a1111"}),
    OddFile(
        *("part", partial(make_lora, "flux", "kohya"), "⚠", 3),
        "sd-scripts applies 25 of 27 updates, and skips 2",
        asked={"program": "sd-scripts"},
    ),
    OddFile(
        "beside", partial(make_beside, "gain", torch.ones(1)), "⚠", 3, "1 part of this file is"
    ),
    OddFile("nan", partial(make_beside, "diff_b", NAN), "✖", 3, "1 tensor", asked={"deep": True}),
]
"""Every kind of file that was answered wrongly once, and what is no LoRA at all."""


def make_thread(size: str, prefix: str, roles: dict[str, str], modules: str) -> Content:
    """Makes a file by its names and shapes; every number is 0.01, every alpha 2.

    `roles` is suffix -> axes, "or" for out × rank; `modules` a pattern, or q, k and v fused.
    """
    shapes, tensors = load_layout(size).shapes, {}
    sizes = {name: s for name, s in shapes.items() if re.fullmatch(modules, name)}
    if modules.endswith("to_qkv"):
        parts = [shapes[modules.removesuffix("qkv") + x] for x in "qkv"]
        sizes = {modules: (sum(part[0] for part in parts), parts[0][1])}
    for name, (out, inputs) in sizes.items():
        side = {"o": out, "i": inputs, "r": 2, "4": 4, "O": out // 4, "I": inputs // 4, "1": 1}
        path = prefix + (name.replace(".", "_") if prefix[-1] == "_" else name)
        for role, axes in roles.items():
            number = 0.01 if axes else 2.0
            tensors[f"{path}.{role}"] = torch.full([side[axis] for axis in axes], number)
    return tensors


LOKR = {"lokr_w1": "44", "lokr_w2": "OI", "alpha": ""}
LOHA = {"hada_w1_a": "or", "hada_w1_b": "ri", "hada_w2_a": "or", "hada_w2_b": "ri", "alpha": ""}
PEFT, KOHYA = (
    {f"{x}.weight": axes for x, axes in zip(two, ("or", "ri"), strict=True)}
    for two in (("lora.up", "lora.down"), ("lora_up", "lora_down"))
)
FUSED = "text_fusion.layerwise_blocks.0.attn.to_qkv"
ALL, NOT_TRIED = "ComfyUI applies all of it", "ComfyUI was not tried with such a file"
NONE = "ComfyUI reads nothing of it; `convert()` it with `format=comfyui`"
DOKR = LOKR | {"dora_scale": "o1"}
KLEIN, TWICE = "transformer_blocks.0.ff_context.linear_out", "transformer.base_model.model."
Z_IMAGE, SD35 = r"noise_refiner.0.(attention.to.*|adaLN.*)", r"transformer_blocks.[34].attn2.to_.*"
EVERY = r"(single_)?transformer_blocks.*attn.to_[qkv]"
THREADS = {
    "ComfyUI, Krea 2 with DoKR": ("krea2", "lycoris_", DOKR, FUSED, "⚠", NOT_TRIED),
    "comfyui-lycoris, LoHa": ("z-image", "lycoris_", LOHA, Z_IMAGE, "✔", ALL),
    "SimpleTuner, FLUX.2 LoKr": ("flux2-klein-9b", "lycoris_", LOKR, KLEIN, "✔", ALL),
    "SimpleTuner, keys broke": ("flux1-dev", TWICE, PEFT, EVERY, "⚠", NOT_TRIED),
    "ComfyUI, SD 3.5 LyCORIS": ("sd3.5-medium", "lycoris_", LOKR, SD35, "✔", ALL),
    "Wan2GP": ("z-image", "lora_unet_", KOHYA, r"layers.0.attention.to_.*", "✖", NONE),
}
"""Files of threads, and what `check` says of each for ComfyUI, which has learned to read some."""
