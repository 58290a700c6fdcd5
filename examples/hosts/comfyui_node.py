"""A ComfyUI node: loads a LoRA of the first model into the second."""

import comfy.sd
import folder_paths

import prolora


class LoadMovedLora:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "load", "loaders"

    @classmethod
    def INPUT_TYPES(cls):
        names = (folder_paths.get_filename_list("loras"),)
        return {"required": {"trained_on": ("MODEL",), "model": ("MODEL",), "lora": names}}

    def load(self, trained_on, model, lora):
        networks = (one.model.diffusion_model for one in (trained_on, model))
        moved = prolora.transfer(folder_paths.get_full_path("loras", lora), *networks)
        return comfy.sd.load_lora_for_models(model, None, moved.state_dict("comfy"), 1, 0)[:1]
