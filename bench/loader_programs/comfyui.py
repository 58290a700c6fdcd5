"""ComfyUI: the key map of the model that it detects and builds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from prolora.architectures.family import Family
from prolora.architectures.layouts import load_layout

from .common import Keys, Open, Read, enter, store_hollow, with_alphas
from .text_encoders import list_weights

_LYRICS = {
    "encoder.lyric_encoder.layers.0.input_layernorm.weight": (2048,),
    "encoder.lyric_encoder.layers.0.self_attn.q_proj.weight": (2048, 2048),
    "encoder.lyric_encoder.layers.0.mlp.gate_proj.weight": (6144, 2048),
}
COMFYUI_HINTS = {
    "ace-step-1.5": _LYRICS | {"decoder.layers.0.self_attn_norm.weight": (2048,)},
    "ace-step-1.5-xl": _LYRICS | {"decoder.layers.0.self_attn_norm.weight": (2560,)},
    "auraflow": {"positional_encoding": (1, 9216, 3072)},
    "boogu-image": {"time_caption_embed.caption_embedder.0.weight": (4096,)},
    "chroma": {
        "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
        "distilled_guidance_layer.norms.0.scale": (5120,),
    },
    "chroma-radiance": {
        "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
        "distilled_guidance_layer.norms.0.scale": (5120,),
        "nerf_blocks.0.norm.scale": (64,),
        "nerf_final_layer_conv.norm.scale": (64,),
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
    "mageflow": {"txt_norm.weight": (2560,)},
    "minimax-h3": {"blocks.0.attn.q_norm.weight": (128,), "rope.inv_freq": (16,)},
    "qwen-image": {"txt_norm.weight": (3584,)},
    "wan2.1-i2v-14b": {"img_emb.proj.0.bias": (1280,)},
    "wan2.2-animate-14b": {
        "img_emb.proj.0.bias": (1280,),
        "face_adapter.fuser_blocks.0.k_norm.weight": (128,),
    },
    "z-image": {"noise_refiner.0.attention.k_norm.weight": (128,)},
}
"""Norms by which ComfyUI tells a family or size: layouts have matrices only."""
COMFYUI_PREFIXES = {"ace-step-1.5": "decoder."}
"""Family -> what its checkpoints have before the names of the transformer."""
COMFYUI_CONFIGS = {
    "ltx2.3": {"apply_gated_attention": True, "cross_attention_adaln": True},
    "ltx2.5": {"apply_gated_attention": True, "cross_attention_adaln": True},
}
"""What the header of a checkpoint says of its transformer where ComfyUI reads that."""


def open_program(checkout: Path) -> Open:
    """`comfy.lora.load_lora` with the key map of the model that ComfyUI detects and builds."""
    enter(checkout, "torchvision", "torchaudio", "av", "kornia", "spandrel", "scipy", "sqlalchemy")
    import comfy.cli_args  # type: ignore[import-not-found]

    comfy.cli_args.args.cpu = True
    import comfy.lora  # type: ignore[import-not-found]
    import comfy.lora_convert  # type: ignore[import-not-found]
    import comfy.model_detection as detection  # type: ignore[import-not-found]

    def build(family: Family, layout: str) -> torch.nn.Module | None:
        if family.unet:
            state = {
                f"{name}.weight": torch.empty(shape, device="meta")
                for name, shape in load_layout(layout).shapes.items()
            }
            config = detection.unet_config_from_diffusers_unet(state)
        else:
            prefix = COMFYUI_PREFIXES.get(family.id, "")
            state = {prefix + key: value for key, value in store_hollow(family, layout).items()}
            hints = COMFYUI_HINTS.get(layout) or COMFYUI_HINTS.get(family.id, {})
            state |= {key: torch.empty(shape, device="meta") for key, shape in hints.items()}
            header = json.dumps({"transformer": COMFYUI_CONFIGS.get(layout, {})})
            config = detection.detect_unet_config(state, "", metadata={"config": header})
        chosen = detection.model_config_from_unet_config(config, state) if config else None
        if chosen is None:
            return None
        if family.id == "ace-step-1.5":
            import comfy.ldm.ace.ace_step15 as ace  # type: ignore[import-not-found]

            # It computes while it is built, and has no LoRAs.
            ace.AceStepAudioTokenizer = lambda *_, **__: None
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
        texts = list_weights(layout)
        shapes |= texts
        key_map = comfy.lora.model_lora_keys_unet(model, {})
        encoders = SimpleNamespace(state_dict=lambda: texts)
        key_map = comfy.lora.model_lora_keys_clip(encoders, key_map)

        def read(tensors: dict[str, Tensor], keys: Keys) -> set[str]:
            by_id = {id(tensor): key for key, tensor in tensors.items()}
            # ComfyUI first renames the keys of some files, for example Wan Fun's.
            renamed = comfy.lora_convert.convert_lora(dict(tensors))
            patches = comfy.lora.load_lora(renamed, key_map, log_missing=False)
            taken: set[str] = set()
            for target, patch in patches.items():
                name, rows = target, None
                if isinstance(target, tuple):
                    name, rows = target[0], target[1]
                shape = list(shapes[name])
                if rows is not None:
                    shape[rows[0]] = rows[2]
                if isinstance(patch, tuple):  # a difference of the weight
                    difference = patch[1][0]
                    key = next(key for key, tensor in renamed.items() if tensor is difference)
                    taken |= {key} if [*difference.shape] == shape else set()
                    continue
                if getattr(patch, "name", "") != "lora":  # all keys of a file are in every patch
                    taken |= getattr(patch, "loaded_keys", set())
                    continue
                up, down = patch.weights[0], patch.weights[1]
                if [len(up), down[0].numel()] == [shape[0], torch.Size(shape[1:]).numel()]:
                    taken |= patch.loaded_keys
            own = {by_id.get(id(renamed[key]), "") for key in taken & renamed.keys()}
            return with_alphas(own & tensors.keys(), tensors)

        return read

    return open_model
