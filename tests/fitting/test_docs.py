"""The example of docs/fit.md runs as it is printed, with fewer images and steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tiny_pipelines as tiny

from prolora import adapters
from prolora.fitting import pipelines

PAGE = Path(__file__).parents[2] / "docs" / "fit.md"


class FewSteps:
    """A diffusers pipeline that samples latents in two steps."""

    def __init__(self, folder: Path) -> None:
        self.pipe = pipelines.open_pipeline(folder).pipe
        self.unet = self.pipe.unet

    def __call__(self, prompt: str, **options: Any) -> Any:
        return self.pipe(prompt, num_inference_steps=2, output_type="latent", **options)


def test_the_python_example_runs_and_writes_a_lora(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "source")
    source = FewSteps(tmp_path / "source")
    tiny.save(tmp_path / "target", unet=source.unet, scheduler="euler")
    target = FewSteps(tmp_path / "target")
    tiny.write_lora(
        tmp_path / "lora.safetensors", tiny.updates(source.unet, ("attn1.to_v", "ff.net.2"))
    )
    example = re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert example and example[1].count("rank=32") == 1
    few = example[1].replace("rank=32", "rank=32, images=2, fit_steps=2")
    exec(few, {"source": source, "target": target})
    assert "modules fitted in" in capsys.readouterr().out
    assert adapters.read_adapter("moved.safetensors").updates
