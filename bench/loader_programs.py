"""What each program does with the keys of a LoRA, called in a folder of its source."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from loader_matrix import Keys, Open, Read
from torch import Tensor

from prolora.architectures.family import Family
from prolora.architectures.layouts import load_layout
from prolora.architectures.ldm import diffusers_to_ldm
from prolora.architectures.modules import matrix_shape


class _EmptyPackages(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that a program imports and this does not need, where they are not installed."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = {name for name in names if importlib.util.find_spec(name) is None}

    def find_spec(
        self, fullname: str, path: object, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = MagicMock(name=spec.name)
        module.__spec__, module.__path__, module.__name__ = spec, [], spec.name
        module.__version__ = "0"
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def enter(checkout: Path, *missing: str) -> None:
    """Makes a checkout importable."""
    sys.path.insert(0, str(checkout))
    sys.meta_path.append(_EmptyPackages(missing))


def with_alphas(taken: set[str], tensors: Iterable[str]) -> set[str]:
    """The keys taken, and the alphas beside them."""
    return taken | {
        key
        for key in tensors
        if key.endswith(".alpha") and f"{key.removesuffix('alpha')}lora_up.weight" in taken
    }


def take_modules(read: Iterable[str], keys: Keys) -> set[str]:
    """The keys that hold nothing but modules that were read."""
    read = set(read)
    lost = {key for name, of in keys.items() if name not in read for key in of}
    return {key for of in keys.values() for key in of} - lost


def name_weights(family: Family, layout: str) -> dict[str, tuple[int, ...]]:
    """The weights of a checkpoint as the authors name them -> their shapes."""
    parts: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in load_layout(layout).shapes.items():
        weight = None if family.unet else family.find_weight_holding(name)
        stored = weight.name if weight else name
        if family.unet:
            layers = 1 if family.id in ("koala", "bk-sdm") else 2
            stored = diffusers_to_ldm(name, layers_per_block=layers) or name
        parts.setdefault(stored, []).append(shape)
    bare = ("table", "token", "tokens", ".pos_embed", ".modulation", "_ca_video", "_ca_audio")
    return {
        name if name.endswith(bare) else f"{name}.weight": (sum(s[0] for s in of), *of[0][1:])
        for name, of in parts.items()
    }


def store_hollow(family: Family, layout: str) -> dict[str, Tensor]:
    """A checkpoint in the authors' names on the meta device: matrices and biases."""
    state = {}
    for name, shape in name_weights(family, layout).items():
        state[name] = torch.empty(shape, device="meta")
        if name.endswith(".weight"):
            state[f"{name.removesuffix('weight')}bias"] = torch.empty(shape[0], device="meta")
    return state


COMFYUI_HINTS = {
    "auraflow": {"positional_encoding": (1, 9216, 3072)},
    "chroma": {
        "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
        "distilled_guidance_layer.norms.0.scale": (5120,),
    },
    "flux": {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)},
    "longcat-image": {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)},
    "flux2": {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)},
    "hunyuan-image": {"txt_in.individual_token_refiner.blocks.0.norm1.weight": (3584,)},
    "hunyuan-video": {"txt_in.individual_token_refiner.blocks.0.norm1.weight": (3072,)},
    "hunyuan-video-1.5": {
        "txt_in.individual_token_refiner.blocks.0.norm1.weight": (2048,),
        "vision_in.proj.0.weight": (1152,),
    },
    "kandinsky5": {"visual_transformer_blocks.0.cross_attention.key_norm.weight": (64,)},
    "krea2": {
        "txtfusion.layerwise_blocks.0.prenorm.scale": (2560,),
        "blocks.0.attn.qknorm.qnorm.scale": (128,),
    },
    "lumina2": {"noise_refiner.0.attention.k_norm.weight": (96,)},
    "minimax-h3": {"blocks.0.attn.q_norm.weight": (128,), "rope.inv_freq": (16,)},
    "qwen-image": {"txt_norm.weight": (3584,)},
    "wan2.1-i2v-14b": {"img_emb.proj.0.bias": (1280,)},
    "z-image": {"noise_refiner.0.attention.k_norm.weight": (128,)},
}
"""Norms by which ComfyUI tells a family or size: layouts have matrices only."""
COMFYUI_CONFIGS = {
    "ltx2.3": {"apply_gated_attention": True, "cross_attention_adaln": True},
    "ltx2.5": {"apply_gated_attention": True, "cross_attention_adaln": True},
}
"""What the header of a checkpoint says of its transformer where ComfyUI reads that."""


def open_comfyui(checkout: Path) -> Open:
    """`comfy.lora.load_lora` with the key map of the model that ComfyUI detects and builds."""
    enter(checkout, "torchvision", "torchaudio", "av", "kornia", "spandrel", "scipy", "sqlalchemy")
    import comfy.cli_args  # type: ignore[import-not-found]

    comfy.cli_args.args.cpu = True
    import comfy.lora  # type: ignore[import-not-found]
    import comfy.model_detection as detection  # type: ignore[import-not-found]

    def build(family: Family, layout: str) -> torch.nn.Module | None:
        if family.unet:
            state = {
                f"{name}.weight": torch.empty(shape, device="meta")
                for name, shape in load_layout(layout).shapes.items()
            }
            config = detection.unet_config_from_diffusers_unet(state)
        else:
            state = store_hollow(family, layout)
            hints = COMFYUI_HINTS.get(layout) or COMFYUI_HINTS.get(family.id, {})
            state |= {key: torch.empty(shape, device="meta") for key, shape in hints.items()}
            header = json.dumps({"transformer": COMFYUI_CONFIGS.get(layout, {})})
            config = detection.detect_unet_config(state, "", metadata={"config": header})
        chosen = detection.model_config_from_unet_config(config, state) if config else None
        if chosen is None:
            return None
        chosen.set_inference_dtype(torch.float32, torch.float32)
        model = chosen.get_model(state, "", device="meta")
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        if not family.unet:  # another model that begins with the same names is not this one
            ours = [key for key in state if key.endswith(".weight") and state[key].ndim > 1]
            found = [shapes.get(f"diffusion_model.{key}") == state[key].shape for key in ours]
            if 10 * sum(found) < 9 * len(found):
                return None
        return model  # type: ignore[no-any-return]

    def open_model(family: Family, layout: str) -> Read | None:
        model = build(family, layout)
        if model is None:
            return None
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        key_map = comfy.lora.model_lora_keys_unet(model, {})

        def read(tensors: dict[str, Tensor], keys: Keys) -> set[str]:
            patches = comfy.lora.load_lora(tensors, key_map, log_missing=False)
            taken = set()
            for target, patch in patches.items():
                name, rows = target, None
                if isinstance(target, tuple):
                    name, rows = target[0], target[1]
                up, down = patch.weights[0], patch.weights[1]
                shape = list(shapes[name])
                if rows is not None:
                    shape[rows[0]] = rows[2]
                if [len(up), down[0].numel()] == [shape[0], torch.Size(shape[1:]).numel()]:
                    taken |= patch.loaded_keys
            return with_alphas(taken, tensors)

        return read

    return open_model


DIFFUSERS_PIPELINES = {
    "auraflow": "AuraFlowPipeline",
    "bk-sdm": "StableDiffusionPipeline",
    "bria-fibo": "BriaFiboPipeline",
    "chroma": "ChromaPipeline",
    "cogvideox": "CogVideoXPipeline",
    "cogview4": "CogView4Pipeline",
    "cosmos": "AnimaModularPipeline",
    "ernie-image": "ErnieImagePipeline",
    "flux": "FluxPipeline",
    "flux2": "Flux2Pipeline",
    "flux3": "Flux3ModularPipeline",
    "hidream": "HiDreamImagePipeline",
    "hunyuan-video": "HunyuanVideoPipeline",
    "hunyuan-video-1.5": "HunyuanVideo15ModularPipeline",
    "ideogram4": "Ideogram4Pipeline",
    "kandinsky5": "Kandinsky5T2VPipeline",
    "koala": "StableDiffusionXLPipeline",
    "krea2": "Krea2Pipeline",
    "ltx2": "LTX2Pipeline",
    "ltxv": "LTXPipeline",
    "lumina2": "Lumina2Pipeline",
    "minimax-h3": "MiniMaxH3ModularPipeline",
    "mochi": "MochiPipeline",
    "qwen-image": "QwenImagePipeline",
    "qwen-image-2.1": "QwenImage21Pipeline",
    "sana": "SanaPipeline",
    "sd15": "StableDiffusionPipeline",
    "sd21": "StableDiffusionPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "segmind-vega": "StableDiffusionXLPipeline",
    "ssd-1b": "StableDiffusionXLPipeline",
    "wan": "WanPipeline",
    "z-image": "ZImagePipeline",
}


def open_diffusers(checkout: Path) -> Open:
    """`lora_state_dict` of the family's pipeline, which `load_lora_weights` calls first."""
    enter(checkout)
    import diffusers
    from diffusers.configuration_utils import FrozenDict
    from diffusers.utils import convert_unet_state_dict_to_peft

    blocks = {"sd15": 4, "sd21": 4, "bk-sdm": 4}

    def open_model(family: Family, layout: str) -> Read | None:
        pipeline = getattr(diffusers, DIFFUSERS_PIPELINES.get(family.id, " "), None)
        if not hasattr(pipeline, "lora_state_dict"):
            return None
        # Anima's adapter of text is a model of its own in diffusers.
        shapes = load_layout(layout).shapes
        shapes = {n: shape for n, shape in shapes.items() if not n.startswith("llm_adapter.")}
        options = {}
        if family.unet:
            layers = 1 if family.id in ("koala", "bk-sdm") else 2
            down = [""] * blocks.get(family.id, 3)
            options["unet_config"] = FrozenDict(layers_per_block=layers, down_block_types=down)

        def read(tensors: dict[str, Tensor], keys: Keys) -> set[str]:
            state = pipeline.lora_state_dict(tensors, **options)
            state = state[0] if isinstance(state, tuple) else state
            if family.unet:
                state = convert_unet_state_dict_to_peft(state)
            prefix, sizes = ("unet." if family.unet else "transformer."), {}
            for key, tensor in state.items():
                if key.startswith(prefix):
                    path, _, end = key.removeprefix(prefix).partition(".lora_")
                    sizes.setdefault(path, {})[end[:1]] = tensor
            found = {
                path
                for path, size in sizes.items()
                if path in shapes
                and {"A", "B"} <= size.keys()
                and (len(size["B"]), size["A"][0].numel()) == matrix_shape(shapes[path])
            }
            return take_modules(found, keys)

        return read

    return open_model


SDCPP_VERSIONS = {
    "chroma": "VERSION_FLUX",
    "longcat-image": "VERSION_LONGCAT",
    "cosmos": "VERSION_ANIMA",
    "ernie-image": "VERSION_ERNIE_IMAGE",
    "flux": "VERSION_FLUX",
    "flux2": "VERSION_FLUX2",
    "hunyuan-video": "VERSION_HUNYUAN_VIDEO",
    "hunyuan-video-1.5": "VERSION_HUNYUAN_VIDEO",
    "ideogram4": "VERSION_IDEOGRAM4",
    "krea2": "VERSION_KREA2",
    "ltx2": "VERSION_LTXAV",
    "minimax-h3": "VERSION_MINIMAX_H3",
    "qwen-image": "VERSION_QWEN_IMAGE",
    "sd15": "VERSION_SD1",
    "sd21": "VERSION_SD2",
    "sd3": "VERSION_SD3",
    "sdxl": "VERSION_SDXL",
    "segmind-vega": "VERSION_SDXL_VEGA",
    "ssd-1b": "VERSION_SDXL_SSD1B",
    "wan": "VERSION_WAN2",
    "z-image": "VERSION_Z_IMAGE",
}
_SDCPP_MAIN = """
#include <iostream>
#include "core/util.h"
#include "name_conversion.h"
bool starts_with(const std::string& s, const std::string& t) { return s.rfind(t, 0) == 0; }
bool ends_with(const std::string& s, const std::string& t) {
    return s.size() >= t.size() && s.compare(s.size() - t.size(), t.size(), t) == 0;
}
bool contains(const std::string& s, const std::string& t) { return s.find(t) != s.npos; }
std::vector<std::string> split_string(const std::string& s, char sep) {
    std::vector<std::string> parts(1);
    for (char c : s) if (c == sep) parts.emplace_back(); else parts.back() += c;
    return parts;
}
int main() {
    std::string name;
    while (std::getline(std::cin, name)) std::cout << convert_tensor_name(name, VERSION) << "\\n";
}
"""


def open_sdcpp(checkout: Path) -> Open:
    """stable-diffusion.cpp's `convert_tensor_name`, compiled, for the names of both sides.

    It adds to a weight what stands behind its name (`.weight`, and `.weight.1`, `.weight.2` for
    further rows) if the rows come out even, as `get_lora_weight_diff` does.
    """
    folder = Path(tempfile.mkdtemp(prefix="sdcpp"))

    @cache
    def build(version: str) -> Path:
        main, program = folder / f"{version}.cpp", folder / version
        main.write_text(_SDCPP_MAIN.replace("VERSION)", f"{version})"))
        includes = [f"-I{checkout / part}" for part in ("src", "include", "ggml/include")]
        source = folder / "name_conversion.o"
        compiler = ["g++", "-std=c++17", "-O0", *includes]
        if not source.exists():
            names = str(checkout / "src/name_conversion.cpp")
            subprocess.run([*compiler, "-c", names, "-o", str(source)], check=True)
        subprocess.run([*compiler, str(main), str(source), "-o", str(program)], check=True)
        return program

    def convert(version: str, names: list[str]) -> list[str]:
        text = "\n".join(names) + "\n"
        done = subprocess.run(
            [build(version)], input=text, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    def open_model(family: Family, layout: str) -> Read | None:
        version = SDCPP_VERSIONS.get(family.id)
        if version is None:
            return None
        shapes = name_weights(family, layout)
        stored = [f"model.diffusion_model.{name}" for name in shapes]
        weights = dict(zip(convert(version, stored), shapes.values(), strict=True))

        def read(tensors: dict[str, Tensor], keys: Keys) -> set[str]:
            converted = convert(version, [f"lora.{key}" for key in tensors])
            found = dict(zip(converted, tensors, strict=True))
            taken: set[str] = set()
            for weight, shape in weights.items():
                rows, columns, parts = 0, set(), set()
                for index in itertools.count():
                    part = f"lora.{weight}.{index}" if index else f"lora.{weight}"
                    both = [found.get(f"{part}.lora_{end}") for end in ("up", "down")]
                    if None in both:
                        break
                    rows += len(tensors[both[0]])
                    columns.add(tensors[both[1]][0].numel())
                    parts |= {*both, found.get(f"{part}.alpha")}
                if rows == shape[0] and columns == {torch.Size(shape[1:]).numel()}:
                    taken |= parts
            return taken - {None}

        return read

    return open_model


MFLUX_MAPPINGS = {
    "cosmos": "anima.weights.anima_lora_mapping:AnimaLoRAMapping",
    "ernie-image": "ernie_image.weights.ernie_lora_mapping:ErnieLoRAMapping",
    "flux": "flux.weights.flux_lora_mapping:FluxLoRAMapping",
    "flux2": "flux2.weights.flux2_lora_mapping:Flux2LoRAMapping",
    "flux3": "flux3.weights.flux3_lora_mapping:Flux3LoRAMapping",
    "ideogram4": "ideogram4.weights.ideogram4_lora_mapping:Ideogram4LoRAMapping",
    "krea2": "krea2.weights.krea2_lora_mapping:Krea2LoRAMapping",
    "qwen-image": "qwen.weights.qwen_lora_mapping:QwenLoRAMapping",
    "qwen-image-2.1": "qwen21.weights.qwen21_lora_mapping:Qwen21LoRAMapping",
    "z-image": "z_image.weights.z_image_lora_mapping:ZImageLoRAMapping",
}


def blank_numbers(name: str) -> str:
    """A key, or a pattern of keys with {block} in it, without its numbers."""
    return re.sub(r"\{block\}|\d+", "#", name)


def open_mflux(checkout: Path) -> Open:
    """mflux's `LoRALoader`: the patterns of the family's mapping that a key matches."""
    enter(checkout, "mlx", "PIL", "piexif", "toml", "platformdirs", "filelock", "cv2", "matplotlib")
    loader = importlib.import_module("mflux.models.common.lora.mapping.lora_loader").LoRALoader

    def open_model(family: Family, layout: str) -> Read | None:
        if family.id not in MFLUX_MAPPINGS or layout.startswith("cosmos"):
            return None
        module, _, name = MFLUX_MAPPINGS[family.id].partition(":")
        mapping = getattr(importlib.import_module(f"mflux.models.{module}"), name)
        # Every key against every pattern takes minutes: those of other names are left out.
        patterns: dict[str, list[Any]] = {}
        for one in loader._build_pattern_mappings(mapping.get_mapping()):
            patterns.setdefault(blank_numbers(one.source_pattern), []).append(one)

        def read(tensors: dict[str, Tensor], keys: Keys) -> set[str]:
            found: dict[str, set[str]] = {}
            for key in tensors:
                for one in patterns.get(blank_numbers(key), ()):
                    if loader._match_pattern(key, one.source_pattern) is not None:
                        found.setdefault(key, set()).add(one.matrix_name)
            factors = {key for key, names in found.items() if names & {"lora_A", "lora_B"}}
            paths = [
                {key.rpartition(end)[0] for key in factors if end in key}
                for end in (".lora_A", ".lora_B", ".lora_down", ".lora_up")
            ]
            whole = (paths[0] & paths[1]) | (paths[2] & paths[3])
            alphas = {key for key, names in found.items() if names == {"alpha"}}
            taken = {key for key in factors if key.rpartition(".lora_")[0] in whole} | alphas
            # A scale that is not read changes what the factors do.
            lost = {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
            lost -= {key.removesuffix(".alpha") for key in alphas}
            return {key for key in taken if key.rpartition(".lora_")[0] not in lost}

        return read

    return open_model


DIFFSYNTH_MODELS: dict[str, tuple[str, dict[str, object], str]] = {
    "anima": ("anima_dit:AnimaDiT", {}, ""),
    "ernie-image": ("ernie_image_dit:ErnieImageDiT", {}, ""),
    "flux1-dev": ("flux_dit:FluxDiT", {}, "flux:FluxLoRALoader"),
    "flux2-dev": ("flux2_dit:Flux2DiT", {}, ""),
    "krea2": ("krea2_dit:SingleStreamDiT", {}, "krea2:Krea2LoRALoader"),
    "ltx2": ("ltx2_dit:LTXModel", {}, ""),
    "minimax-h3": ("minimax_h3_dit:MiniMaxH3DiT", {}, "minimax_h3:MiniMaxH3LoRALoader"),
    "qwen-image": ("qwen_image_dit:QwenImageDiT", {}, ""),
    "wan-t2v-14b": (
        "wan_video_dit:WanModel",
        dict(
            dim=5120,
            in_dim=16,
            ffn_dim=13824,
            out_dim=16,
            text_dim=4096,
            freq_dim=256,
            eps=1e-6,
            patch_size=(1, 2, 2),
            num_heads=40,
            num_layers=40,
            has_image_input=False,
        ),
        "",
    ),
    "wan2.1-i2v-14b": (
        "wan_video_dit:WanModel",
        dict(
            dim=5120,
            in_dim=36,
            ffn_dim=13824,
            out_dim=16,
            text_dim=4096,
            freq_dim=256,
            eps=1e-6,
            patch_size=(1, 2, 2),
            num_heads=40,
            num_layers=40,
            has_image_input=True,
        ),
        "",
    ),
    "z-image": ("z_image_dit:ZImageDiT", {}, ""),
}
"""Layout -> (model's class, its arguments, the loader of LoRAs where the family has its own)."""


def open_diffsynth(checkout: Path) -> Open:
    """DiffSynth's `convert_state_dict`, and the modules of its model by these names."""
    enter(
        checkout,
        "modelscope",
        "PIL",
        "imageio",
        "torchvision",
        "pandas",
        "sentencepiece",
        "ftfy",
        "scipy",
        "librosa",
        "torchaudio",
        "cv2",
        "protobuf",
        "datasets",
    )
    general = importlib.import_module("diffsynth.utils.lora.general").GeneralLoRALoader

    def open_model(family: Family, layout: str) -> Read | None:
        if layout not in DIFFSYNTH_MODELS:
            return None
        model, options, own = DIFFSYNTH_MODELS[layout]
        module, _, name = model.partition(":")
        with torch.device("meta"):
            built = getattr(importlib.import_module(f"diffsynth.models.{module}"), name)(**options)
        shapes = {
            name: matrix_shape(tuple(module.weight.shape))
            for name, module in built.named_modules()
            if isinstance(getattr(module, "weight", None), Tensor)
        }
        loader = general
        if own:
            module, _, name = own.partition(":")
            loader = getattr(importlib.import_module(f"diffsynth.utils.lora.{module}"), name)

        def read(tensors: dict[str, Tensor], keys: Keys) -> set[str]:
            # Each module has factors of its own value, by which they are found again.
            paths = {key.rpartition(".lora_")[0] for key in tensors if ".lora_" in key}
            marks = {float(i + 2): path for i, path in enumerate(sorted(paths))}
            values = {path: mark for mark, path in marks.items()}
            for key, tensor in tensors.items():
                if ".lora_" in key:
                    tensor.fill_(values[key.rpartition(".lora_")[0]])
            state = loader().convert_state_dict(tensors)
            rows: dict[str, dict[float, int]] = {}
            for name, shape in shapes.items():
                up, down = (state.get(f"{name}.lora_{end}.weight") for end in "BA")
                if up is None or down is None:
                    continue
                if (len(up), down[0].numel()) == shape:
                    for mark in down.unique().tolist():
                        rows.setdefault(name, {})[mark] = 1
            read_paths = {marks[m] for of in rows.values() for m in of if m in marks}
            taken = {key for key in tensors if key.rpartition(".lora_")[0] in read_paths}
            return with_alphas(taken, tensors)

        return read

    return open_model


LIGHTX2V_NAMES = {
    "ltx2": "model.diffusion_model.",
    "qwen-image": "",
    "wan": "",
    "z-image": "",
}
"""Families whose runners apply LoRAs -> what stands before the names of the weights there.

Z-Image's are diffusers' names, the others' are the authors', which Qwen-Image shares.
"""


def open_lightx2v(checkout: Path) -> Open:
    """LightX2V's `LoRALoader.extract_lora_pairs`, held against the weights of the checkpoint."""
    enter(checkout, "loguru")
    path = checkout / "lightx2v/utils/lora_loader.py"
    spec = importlib.util.spec_from_file_location("lightx2v_lora_loader", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def open_model(family: Family, layout: str) -> Read | None:
        prefix = LIGHTX2V_NAMES.get(family.id)
        if prefix is None:
            return None
        weights = {f"{prefix}{name}": shape for name, shape in name_weights(family, layout).items()}
        if family.id == "z-image":
            weights = {f"{n}.weight": shape for n, shape in load_layout(layout).shapes.items()}
        loader = module.LoRALoader(model_prefix=prefix or None)

        def read(tensors: dict[str, Tensor], keys: Keys) -> set[str]:
            taken = set()
            for name, pair in loader.extract_lora_pairs(tensors).items():
                up, down = tensors[pair["up_key"]], tensors[pair["down_key"]]
                if weights.get(name) == (len(up), down.shape[1]):
                    taken |= {pair["up_key"], pair["down_key"]}
            return with_alphas(taken, tensors)

        return read

    return open_model


PROGRAMS: dict[str, tuple[str, Callable[[Path], Open]]] = {
    "comfyui": ("ComfyUI", open_comfyui),
    "diffsynth": ("DiffSynth-Studio", open_diffsynth),
    "diffusers": ("diffusers", open_diffusers),
    "lightx2v": ("LightX2V", open_lightx2v),
    "mflux": ("mflux", open_mflux),
    "sdcpp": ("stable-diffusion.cpp", open_sdcpp),
}
"""Id -> (title, what opens a checkout)."""
