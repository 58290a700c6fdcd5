"""After writing, one line says who reads the file whole, who in part, who not at all."""

import torch

from prolora.adapters import Adapter, write_adapter
from prolora.core.lowrank import LowRank


def test_after_writing_a_line_says_who_reads_the_file_and_who_does_not(prolora, tmp_path):
    one = LowRank(torch.ones(3072, 1), torch.ones(1, 3072))
    lora, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    updates = {f"transformer_blocks.{i}.attn.to_q": one for i in range(60)}
    write_adapter(Adapter(updates, family="qwen-image"), lora, format="comfy")
    code, text, err = prolora("convert", lora, "-o", out, "--for", "musubi")
    assert code == 0, err
    told = " ".join(text.split())
    assert "Read by ComfyUI, diffusers, InvokeAI, mflux, musubi-tuner" in told
    assert "not by DiffSynth-Studio, LightX2V" in told
    code, text, _ = prolora("convert", lora, "-o", tmp_path / "d.safetensors", "--for", "diffsynth")
    assert code == 0 and "DiffSynth-Studio, diffusers, LightX2V" in " ".join(text.split())
    code, _, err = prolora("convert", lora, "-o", tmp_path / "a.safetensors", "--for", "a1111")
    assert code == 2 and "A1111 reads no LoRA for Qwen-Image" in " ".join(err.split())
