"""What boxes are filled with, and the commands that read it."""

from __future__ import annotations

import json
from pathlib import Path

import fleet_files
import mini
import numpy as np
from safetensors.torch import save_file
from sandbox import Box, Words

RANK = ("--method", "prolora", "--rank", "4")
FIT = ["--prompt", "cat", "--images", "1", "--steps", "1", "--size", "16"]
FIT += ["--fit-steps", "4", "--force"]


def bases(box: Box) -> Words:
    return ["--source", box.inputs / "source", "--target", box.inputs / "target"]


def transfer(box: Box, *more: object, lora: str = "lora.safetensors", verb="transfer") -> Words:
    """A transfer of a small LoRA, with a report; or a fit."""
    out = box.out / ("moved" if "peft" in lora else "moved.safetensors")
    ends = [verb, box.inputs / lora, *bases(box)]
    return [*ends, "-o", out, "--report", box.out / "report.json", *more]


def copy(box: Box, *more: object, lora: str = "lora.safetensors") -> Words:
    """A transfer that changes no update, so that the result is known without prolora."""
    return transfer(box, "--method", "copy", "--cache=none", *more, lora=lora)


def use_cache(box: Box) -> Words:
    return transfer(box, *RANK, "--cache", box.cache)


def migrate(box: Box) -> Words:
    targets = ("--target", box.inputs / "target2") if (box.inputs / "target2").exists() else ()
    words = [*bases(box), *targets, "-o", box.out, "--cache=none"]
    return ["migrate", box.inputs / "loras", *words]


def move_batch(box: Box) -> Words:
    loras = sorted((box.inputs / "loras").iterdir())
    return ["transfer", *loras, *bases(box), "-o", box.out / "moved", "--cache=none"]


def fit(box: Box) -> Words:
    return transfer(box, *FIT, "--cache=none", "--resume", box.cache / "kept", verb="fit")


def write_case(box: Box) -> None:
    """A LoRA in kohya's spelling, and two bases."""
    mini.write_case(box.inputs)


def write_loras(box: Box, count: int = 3) -> None:
    """Bases, a LoRA, and a folder of some."""
    write_case(box)
    (box.inputs / "loras").mkdir()
    for number in range(count):
        lora = fleet_files.some_tensors(2 + number, 12)
        save_file(lora, box.inputs / "loras" / f"{number}.safetensors")


def write_collection(box: Box) -> None:
    """A collection of four LoRAs, and a file that is none; two targets."""
    fleet_files.write_collection(box.inputs)


def write_foreign_lora(path: Path) -> None:
    """A trained LoRA that is not prolora's."""
    save_file(mini.lora_tensors(3), path, {"ss_output_name": "mine", "ss_training_comment": "week"})


def write_peft(box: Box) -> None:
    """The LoRA and the bases, and the same LoRA as PEFT writes it."""
    write_case(box)
    folder, tensors = box.inputs / "peft", {}
    for key, tensor in mini.lora_tensors(4, None).items():
        stem, _, role = key.partition(".")
        name = next(n for n in mini.shapes(3) if stem == kohya_stem(n))
        letter = "B" if role.startswith("lora_up") else "A"
        tensors[f"base_model.model.{name}.lora_{letter}.weight"] = tensor
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "use_rslora": False, "use_dora": False}
    config |= {"target_modules": ["to_q", "to_k", "to_v", "net.2"], "bias": "none"}
    config |= {"rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False, "lora_bias": False}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def kohya_stem(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def write_ggufs(box: Box) -> None:
    """Both bases as GGUF files, in float32 and in eight bits."""
    import gguf

    write_case(box)
    for name, weights in (("source", mini.source_weights()), ("target", mini.target_weights())):
        writer = gguf.GGUFWriter(str(box.inputs / f"{name}.gguf"), "flux")
        for number, (module, weight) in enumerate(weights.items()):
            kind, stored = gguf.GGMLQuantizationType.F32, weight.numpy()
            if number % 2 and stored.shape[1] % 32 == 0:
                kind = gguf.GGMLQuantizationType.Q8_0
                stored = gguf.quants.quantize(np.ascontiguousarray(stored), kind)
            writer.add_tensor(f"{module}.weight", stored, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def write_shards(box: Box) -> None:
    """The source in three files with an index."""
    write_case(box)
    folder = box.inputs / "source"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names, table = list(mini.source_weights().items()), {}
    for i in range(3):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-00003.safetensors"
        part = {f"{name}.weight": weight.contiguous() for name, weight in names[i::3]}
        save_file(part, folder / file)
        table |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": table}
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=1))


def write_pipelines(box: Box, vae_seed: int = 0) -> None:
    """Two whole pipelines of a few thousand weights; their latents differ where their VAEs do."""
    import tiny_pipelines
    from diffusers import UNet2DConditionModel

    tiny_pipelines.save(box.inputs / "source")
    tiny_pipelines.save(box.inputs / "target", seed=1, vae_seed=vae_seed)
    unet = UNet2DConditionModel.from_pretrained(box.inputs / "source" / "unet")
    updates = tiny_pipelines.updates(unet, ("attn1.to_v", "ff.net.2"))
    tiny_pipelines.write_lora(box.inputs / "lora.safetensors", updates)


def write_fitted(box: Box) -> None:
    """What a fit kept; its result is gone."""
    write_pipelines(box)
    box.must(*fit(box))
    remove_results(box)


def write_cache(box: Box) -> None:
    """A cache with the subspaces of both bases; the result is gone."""
    write_case(box)
    box.must(*use_cache(box))
    remove_results(box)


def remove_results(box: Box) -> None:
    for path in (box.out / "moved.safetensors", box.out / "report.json"):
        path.unlink()


def list_cache(box: Box) -> list[Path]:
    return [path for path in box.cache.rglob("*") if path.is_file()]
