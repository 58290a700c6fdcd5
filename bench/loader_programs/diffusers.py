"""diffusers: what the loader of the family's pipeline makes of a file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from prolora.architectures.family import Family
from prolora.architectures.layouts import load_layout
from prolora.architectures.modules import TEXT_ENCODERS, is_in_text_encoder, matrix_shape

from .common import Keys, Open, Read, enter, keeps_rows, take_modules
from .text_encoders import build_encoder

DIFFUSERS_PIPELINES = {
    "ace-step-1.5": "AceStepPipeline",
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
    "cosmos-predict2-2b": "Cosmos2TextToImagePipeline",
    "cosmos-predict2.5-2b": "Cosmos2_5_PredictBasePipeline",
    "skyreels-v2-df-1.3b": "SkyReelsV2DiffusionForcingPipeline",
    "wan2.1-i2v-14b": "WanImageToVideoPipeline",
    "wan2.1-vace-14b": "WanVACEPipeline",
    "wan2.2-animate-14b": "WanAnimatePipeline",
}
"""Family, or size of one that has a pipeline with another loader -> pipeline."""
DIFFUSERS_LACKS = ("chroma-radiance", "wan2.2-s2v-14b")
"""Sizes of a family that it has no class of."""


def open_program(checkout: Path) -> Open:
    """`lora_state_dict` of the family's pipeline, which `load_lora_weights` calls first."""
    enter(checkout)
    import diffusers
    from diffusers.configuration_utils import FrozenDict
    from diffusers.utils import convert_unet_state_dict_to_peft

    blocks = {"sd15": 4, "sd21": 4, "bk-sdm": 4}

    def open_model(family: Family, layout: str) -> Read | None:
        named = DIFFUSERS_PIPELINES.get(layout) or DIFFUSERS_PIPELINES.get(family.id, " ")
        pipeline = getattr(diffusers, named, None)
        if pipeline is None or layout in DIFFUSERS_LACKS:
            return None
        if not hasattr(pipeline, "lora_state_dict"):
            return lambda tensors, keys: set()
        shapes = load_layout(layout).shapes
        options = {}
        if family.unet:
            layers = 1 if family.id in ("koala", "bk-sdm") else 2
            down = [""] * blocks.get(family.id, 3)
            options["unet_config"] = FrozenDict(layers_per_block=layers, down_block_types=down)

        encoders = dict(zip(TEXT_ENCODERS, load_layout(layout).text_encoders, strict=False))

        def read_texts(state: dict[str, Tensor]) -> set[str]:
            """The modules of text encoders that get factors."""
            found = set()
            for component in {*pipeline._lora_loadable_modules} & {*encoders}:
                if any(key.startswith(f"{component}.") for key in state):
                    with torch.device("meta"):
                        encoder = build_encoder(encoders[component])
                    encoder = getattr(encoder, "text_model", encoder)
                    pipeline.load_lora_into_text_encoder(
                        state,
                        None,
                        text_encoder=encoder,
                        prefix=component,
                        low_cpu_mem_usage=True,
                    )
                    outer = "text_model." if "clip" in encoders[component] else ""
                    found |= {
                        f"{component}.{outer}{name.removeprefix(outer)}"
                        for name, module in encoder.named_modules()
                        if getattr(module, "lora_B", None)
                    }
            return found

        def read(tensors: dict[str, Tensor], keys: Keys) -> set[str]:
            state = pipeline.lora_state_dict(tensors, **options)
            state = state[0] if isinstance(state, tuple) else state
            texts = read_texts(state) if any(map(is_in_text_encoder, keys)) else set()
            if family.unet:
                state = convert_unet_state_dict_to_peft(state)
            prefix, sizes = ("unet." if family.unet else "transformer."), {}
            for key, tensor in state.items():
                # Anima's adapter of text is a model of its own in diffusers.
                apart = key.startswith("text_conditioner.")
                name = key.replace("text_conditioner.", f"{prefix}llm_adapter.", 1)
                if name.startswith(prefix) and apart == ("llm_adapter." in name):
                    path, _, end = name.removeprefix(prefix).partition(".lora_")
                    sizes.setdefault(path, {})[end[:1]] = tensor
            parts = {"A", "B", *("m" for key in tensors if "dora" in key or "magnitude" in key)}
            found = {
                path
                for path, size in sizes.items()
                if path in shapes
                and parts <= size.keys()
                and (len(size["B"]), size["A"][0].numel()) == matrix_shape(shapes[path])
                and keeps_rows(size["B"])
            }
            return take_modules(found | texts, keys)

        return read

    return open_model
