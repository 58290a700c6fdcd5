"""musubi-tuner: its networks on its models, and its converters of finished files.

It needs the package easydict, which holds the sizes of Wan's models. It must not be mocked: all
configs of Wan would be one object, and all models would have the sizes of the last one.
"""

from __future__ import annotations

import importlib
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from loader_programs import musubi
from loader_programs.common import enter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import Cell, Shape

Module = Callable[[str], Any]
Make = Callable[[Module], nn.Module]

LORA = (".lora_down.weight", ".lora_up.weight", ".alpha")
PEFT = (".lora_A.weight", ".lora_B.weight")


def build_wan(task: str) -> Make:
    def build(module: Module) -> nn.Module:
        config = module("wan.configs").WAN_CONFIGS[task]
        kind = "i2v" if config.i2v else "flf2v" if config.flf2v else "t2v"
        sizes = "dim eps ffn_dim freq_dim in_dim num_heads num_layers out_dim text_len".split()
        return module("wan.modules.model").WanModel(
            model_type=kind,
            model_version="2.2" if config.v2_2 else "2.1",
            attn_mode="torch",
            **{size: getattr(config, size) for size in sizes},
        )

    return build


def build_flux2(version: str) -> Make:
    def build(module: Module) -> nn.Module:
        info = module("flux_2.flux2_utils").FLUX2_MODEL_INFO[version]
        return module("flux_2.flux2_models").Flux2(info.params, "torch", False)

    return build


def build_flux(module: Module) -> nn.Module:
    models = module("flux.flux_models")
    return models.Flux(models.configs_flux_dev_context.params, "torch", False)


def build_qwen_image(layered: bool) -> Make:
    def build(module: Module) -> nn.Module:
        make = module("qwen_image.qwen_image_model").create_model
        return make("torch", False, False, layered, layered, None)

    return build


def build_framepack(module: Module) -> nn.Module:
    """Calls the loader, up to where it reads the file."""
    packed = module("frame_pack.hunyuan_video_packed")
    made = []

    class Read(Exception):
        pass

    class Packed(packed.HunyuanVideoTransformer3DModelPacked):
        def __init__(self, **options: object) -> None:
            super().__init__(**options)
            made.append(self)
            raise Read

    original = packed.HunyuanVideoTransformer3DModelPacked
    Packed.__name__ = original.__name__
    packed.HunyuanVideoTransformer3DModelPacked = Packed
    try:
        packed.load_packed_model("cpu", "", "torch", "cpu")
    except Read:
        return made[0]
    finally:
        packed.HunyuanVideoTransformer3DModelPacked = original
    raise RuntimeError("load_packed_model made no model")


def build_kandinsky(task: str) -> Make:
    def build(module: Module) -> nn.Module:
        config = module("kandinsky5.configs").TASK_CONFIGS[task]
        return module("kandinsky5.models.dit").get_dit(asdict(config.dit_params))

    return build


def build_z_image(module: Module) -> nn.Module:
    return module("zimage.zimage_model").create_model("torch", False, None)


def build_krea2(module: Module) -> nn.Module:
    utils = module("krea2.krea2_utils")
    return utils.SingleStreamDiT(utils.single_mmdit_large_wide, attn_mode="torch")


def build_hunyuan_video_15(task: str) -> Make:
    def build(module: Module) -> nn.Module:
        make = module("hunyuan_video_1_5.hunyuan_video_1_5_models").create_model
        return make(task, "torch", False, None)

    return build


def build_hidream_o1(task: str) -> Make:
    """Builds the model of a single file, which has no mergers for deepstack.

    The config is in the checkpoint only: `loader_programs.musubi` derives the sizes. A checkpoint
    in a folder keeps its mergers for deepstack, and then i2i trains them too.
    """

    def build(module: Module) -> nn.Module:
        model = musubi.build_hidream_o1(module, "hidream-o1")
        model.hidream_o1_task = task
        return model

    return build


MODELS: tuple[tuple[str, str, str, str, str, Make], ...] = (
    ("Wan 2.1 t2v-14B", "wan", "wan-t2v-14b", "WAN", "lora_wan", build_wan("t2v-14B")),
    ("Wan 2.1 t2v-1.3B", "wan", "wan-t2v-1.3b", "WAN", "lora_wan", build_wan("t2v-1.3B")),
    ("Wan 2.1 i2v-14B", "wan", "wan2.1-i2v-14b", "WAN", "lora_wan", build_wan("i2v-14B")),
    ("Wan 2.1 flf2v-14B", "wan", "wan2.1-flf2v-14b", "WAN", "lora_wan", build_wan("flf2v-14B")),
    ("Wan 2.2 t2v-A14B", "wan", "wan-t2v-14b", "WAN", "lora_wan", build_wan("t2v-A14B")),
    ("Wan 2.2 i2v-A14B", "wan", "wan2.2-i2v-14b", "WAN", "lora_wan", build_wan("i2v-A14B")),
    ("FLUX.1 Kontext", "flux", "flux1-dev", "FLUX_KONTEXT", "lora_flux", build_flux),
    ("FLUX.2 dev", "flux2", "flux2-dev", "FLUX_2_DEV", "lora_flux_2", build_flux2("dev")),
    (
        "FLUX.2 klein-base-9b",
        "flux2",
        "flux2-klein-9b",
        "FLUX_2_KLEIN_9B",
        "lora_flux_2",
        build_flux2("klein-base-9b"),
    ),
    (
        "FLUX.2 klein-base-4b",
        "flux2",
        "flux2-klein-4b",
        "FLUX_2_KLEIN_4B",
        "lora_flux_2",
        build_flux2("klein-base-4b"),
    ),
    (
        "Qwen-Image",
        "qwen-image",
        "qwen-image",
        "QWEN_IMAGE",
        "lora_qwen_image",
        build_qwen_image(False),
    ),
    (
        "Qwen-Image-Edit",
        "qwen-image",
        "qwen-image",
        "QWEN_IMAGE_EDIT",
        "lora_qwen_image",
        build_qwen_image(False),
    ),
    (
        "Qwen-Image-Layered",
        "qwen-image",
        "qwen-image",
        "QWEN_IMAGE_LAYERED",
        "lora_qwen_image",
        build_qwen_image(True),
    ),
    (
        "HunyuanVideo",
        "hunyuan-video",
        "hunyuan-video",
        "HUNYUAN_VIDEO",
        "lora",
        lambda module: musubi.build_hunyuan_video(module, "hunyuan-video"),
    ),
    (
        "HunyuanVideo 1.5 t2v",
        "hunyuan-video-1.5",
        "hunyuan-video-1.5",
        "HUNYUAN_VIDEO_1_5",
        "lora_hv_1_5",
        build_hunyuan_video_15("t2v"),
    ),
    (
        "HunyuanVideo 1.5 i2v",
        "hunyuan-video-1.5",
        "hunyuan-video-1.5",
        "HUNYUAN_VIDEO_1_5",
        "lora_hv_1_5",
        build_hunyuan_video_15("i2v"),
    ),
    ("FramePack", "hunyuan-video", "framepack", "FRAMEPACK", "lora_framepack", build_framepack),
    ("Z-Image", "z-image", "z-image", "Z_IMAGE", "lora_zimage", build_z_image),
    ("Krea 2", "krea2", "krea2", "KREA2", "lora_krea2", build_krea2),
    (
        "Ideogram 4",
        "ideogram4",
        "ideogram4",
        "IDEOGRAM4",
        "lora_ideogram4",
        lambda module: musubi.build_ideogram(module, "ideogram4"),
    ),
    *(
        (
            f"Kandinsky 5 {task}",
            "kandinsky5",
            layout,
            "KANDINSKY5",
            "lora_kandinsky",
            build_kandinsky(task),
        )
        for task, layout in (
            ("k5-lite-t2v-5s-sd", "kandinsky5-lite"),
            ("k5-lite-i2v-5s-sd", "kandinsky5-lite"),
            ("k5-pro-t2v-5s-sd", "kandinsky5-pro"),
            ("k5-pro-i2v-5s-sd", "kandinsky5-pro"),
            ("k5-lite-t2i-hd", "kandinsky5-image-lite"),
            ("k5-lite-i2i-hd", "kandinsky5-image-lite-edit"),
        )
    ),
    *(
        (
            f"HiDream-O1 {task}",
            "hidream-o1",
            "hidream-o1",
            "HIDREAM_O1",
            "lora_hidream_o1",
            build_hidream_o1(task),
        )
        for task in ("t2i", "i2i")
    ),
    # prolora has no layout of the Fun-Control models; they differ in their patch embedding.
    ("Wan 2.1 Fun-Control t2v-1.3B", "wan", "", "WAN", "lora_wan", build_wan("t2v-1.3B-FC")),
    ("Wan 2.1 Fun-Control t2v-14B", "wan", "", "WAN", "lora_wan", build_wan("t2v-14B-FC")),
    ("Wan 2.1 Fun-Control i2v-14B", "wan", "", "WAN", "lora_wan", build_wan("i2v-14B-FC")),
)
"""The name of the model, family, layout, the trainer's name of the architecture, the file with its
networks, what builds its model."""

CONVERTED = {
    "HunyuanVideo 1.5 t2v": "convert_hunyuan_video_1_5_lora_to_comfy",
    "Z-Image": "convert_z_image_lora_to_comfy",
}
"""Model -> the script for ComfyUI that the documentation of the model names."""
OTHER = ("Wan 2.1 t2v-14B", "Wan 2.1 i2v-14B", "Qwen-Image", "HunyuanVideo", "FLUX.1 Kontext")
OTHER += ("Z-Image",)
"""Models whose names convert_lora.py has cases for."""


def list_cells(checkout: Path) -> Iterator[Cell]:
    enter(checkout / "src", "torchvision", "cv2", "av", "ftfy", "sentencepiece")

    def module(name: str) -> Any:
        return importlib.import_module(f"musubi_tuner.{name}")

    with patch("torch.cuda.current_device", return_value=0):  # the default of an argument
        module("wan.modules.t5")

    for name, family, layout, architecture, networks, build in MODELS:
        with torch.device("meta"):
            model = build(module)
            network = module(f"networks.{networks}").create_arch_network(
                1.0, 4, 4.0, None, None, model
            )
            network.prepare_network(None)
            network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
        cell = Cell(
            model=name,
            family=family,
            layout=layout,
            how="network class",
            note=f"networks.{networks} on {type(model).__name__}",
            modules=find_modules(network.state_dict(), LORA),
            metadata=describe(module, architecture, networks),
        )
        yield cell
        if name in CONVERTED:
            script = module(f"networks.{CONVERTED[name]}")
            yield convert(cell, script.main, LORA, f"{CONVERTED[name]}.py", lokr_rank=None)
        if name in OTHER:
            state = module("convert_lora").convert_to_diffusers(
                "lora_unet_", None, cell.make_tensors()
            )
            yield replace(
                cell,
                model=f"{name}, converted by convert_lora.py",
                note=f"{cell.note}; convert_to_diffusers of convert_lora.py",
                modules=find_modules(state, PEFT),
                suffixes=PEFT,
            )


def describe(module: Module, architecture: str, networks: str) -> dict[str, str]:
    """Returns what the header says about the model."""
    names = module("dataset.architectures")
    build = module("utils.sai_model_spec").build_metadata
    spec = build(None, getattr(names, f"ARCHITECTURE_{architecture}"), 0.0, "")
    return {
        "ss_base_model_version": getattr(names, f"ARCHITECTURE_{architecture}_FULL"),
        "ss_network_module": f"networks.{networks}",
        **{key: spec[key] for key in ("modelspec.architecture", "modelspec.implementation")},
    }


def find_modules(state: Mapping[str, Tensor], suffixes: tuple[str, ...]) -> dict[str, Shape]:
    """Returns the modules of a file: path -> shape of the weight.

    Raises:
        ValueError: a module lacks one of the suffixes, or a key has none of them.
    """
    down, up = suffixes[:2]
    paths = [key.removesuffix(down) for key in state if key.endswith(down)]
    missing = {path + suffix for path in paths for suffix in suffixes} ^ state.keys()
    if missing or not paths:
        raise ValueError(f"unexpected keys: {sorted(missing)[:5]}")
    return {path: (len(state[path + up]), *state[path + down].shape[1:]) for path in paths}


def convert(
    cell: Cell,
    main: Callable[[Namespace], None],
    suffixes: tuple[str, ...],
    script: str,
    **options: object,
) -> Cell:
    """Runs the main function of a converter on the file of a cell."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = (str(Path(folder, f"{end}.safetensors")) for end in ("in", "out"))
        save_file(cell.make_tensors(), source, dict(cell.metadata))
        main(Namespace(src_path=source, dst_path=target, reverse=False, **options))
        with safe_open(target, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}
    return replace(
        cell,
        model=f"{cell.model}, converted by {script}",
        note=f"{cell.note}; main of {script}",
        modules=find_modules(state, suffixes),
        suffixes=suffixes,
    )
