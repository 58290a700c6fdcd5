"""musubi-tuner: the LoRA merged into a checkpoint on its way in, or networks made for a model."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from prolora.architectures.family import Family
from prolora.architectures.layouts import load_layout

from .common import Keys, Open, Read, enter, fit_factors, name_weights

PACKAGE = "musubi_tuner"
MERGED = ("flux", "flux2", "krea2", "qwen-image", "wan", "z-image")
"""Families whose checkpoints have the names of its models; LoRAs are merged as they are read."""


def build_hunyuan_video(module: Callable[[str], object], layout: str) -> nn.Module:
    make = module("hunyuan_model.models").load_dit_model
    return make(4096, 768, 16, 16, {"dtype": torch.float32})


def build_hunyuan_video_15(module: Callable[[str], object], layout: str) -> nn.Module:
    make = module(
        "hunyuan_video_1_5.hunyuan_video_1_5_models"
    ).HunyuanVideo_1_5_DiffusionTransformer
    return make(task_type="t2v")


KANDINSKY_TASKS = {
    "kandinsky5-pro": "k5-pro-t2v-5s-sd",
    "kandinsky5-image-lite": "k5-lite-t2i-hd",
    "kandinsky5-image-lite-edit": "k5-lite-i2i-hd",
}
"""Size -> its task; the rest are "k5-lite-t2v-5s-sd"."""


def build_kandinsky(module: Callable[[str], object], layout: str) -> nn.Module:
    task = module("kandinsky5.configs").TASK_CONFIGS[
        KANDINSKY_TASKS.get(layout, "k5-lite-t2v-5s-sd")
    ]
    return module("kandinsky5.models.dit").get_dit(asdict(task.dit_params))


def build_hidream_o1(module: Callable[[str], object], layout: str) -> nn.Module:
    from transformers import Qwen3VLConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # Frequencies, which hold no weight; transformers 5 has no function of that name.
    ROPE_INIT_FUNCTIONS.setdefault("default", lambda *_, **__: (torch.ones(64), 1.0))
    text = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36)
    text |= dict(num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936)
    vision = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16)
    vision |= dict(out_hidden_size=4096, deepstack_visual_indexes=[])
    config = Qwen3VLConfig(text_config=text, vision_config=vision)
    return module("hidream_o1.qwen3_vl_transformers").Qwen3VLForConditionalGeneration(config)


def build_ideogram(module: Callable[[str], object], layout: str) -> nn.Module:
    model = module("ideogram4.ideogram4_model")
    return model.Ideogram4Transformer(model.Ideogram4Config())


BUILT = {
    "hidream-o1": (build_hidream_o1, "lora_hidream_o1"),
    "hunyuan-video": (build_hunyuan_video, "lora"),
    "hunyuan-video-1.5": (build_hunyuan_video_15, ""),
    "ideogram4": (build_ideogram, "lora_ideogram4"),
    "kandinsky5": (build_kandinsky, "lora_kandinsky"),
}
"""Family -> (what builds its model, the networks that read its LoRAs; "" where they are merged)."""


def open_program(checkout: Path) -> Open:
    """What is left of a file after merging; or the modules of the networks it makes."""
    enter(checkout / "src", "torchvision", "cv2", "av", "ftfy", "easydict", "sentencepiece")

    def module(name: str) -> object:
        return importlib.import_module(f"{PACKAGE}.{name}")

    def merge(weights: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> set[str]:
        utils, left = module("utils.lora_utils"), []

        def visit(
            *_: object, weight_hook: Callable[..., Tensor], **__: object
        ) -> dict[str, Tensor]:
            for key, weight in weights.items():
                weight_hook(key, weight)
            keys = inspect.getclosurevars(weight_hook).nonlocals["list_of_lora_weight_keys"]
            left.extend(keys[0])
            return {}

        utils.load_safetensors_with_fp8_optimization_and_hook = visit
        hollow = {key: tensor.to("meta") for key, tensor in tensors.items()}
        device = torch.device("meta")
        utils.load_safetensors_with_lora_and_fp8([], [hollow], [1.0], False, device)
        return tensors.keys() - set(left)

    def open_model(family: Family, layout: str) -> Read | None:
        model, networks = None, ""
        if layout == "framepack":  # it has a class of its own for that
            return None
        if family.id in BUILT:
            build, networks = BUILT[family.id]
            with torch.device("meta"):
                model = build(module, layout)
            shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        elif family.id == "z-image":  # ComfyUI's fused ones are cut before the LoRA is looked for
            shapes = {f"{name}.weight": shape for name, shape in load_layout(layout).shapes.items()}
        elif family.id in MERGED:
            shapes = name_weights(family, layout)
        else:
            return None
        weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}

        def read(tensors: dict[str, Tensor], keys: Keys) -> set[str]:
            if not networks:
                return merge(weights, tensors)
            make = module(f"networks.{networks}").create_arch_network_from_weights
            with torch.device("meta"):
                network = make(1.0, tensors, unet=model, for_inference=True)
            return fit_factors(network.unet_loras, tensors)

        return read

    return open_model
