"""Trains the family and makes weights/: ``python make.py --work DIR``, an hour or two on one core.

What DIR has is not trained again, and several processes share the work. Models and LoRAs are stored
in half precision, in the layouts that diffusers reads, and the text encoder becomes a table of what
it says about every prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "bench/quality"))

# isort: split
from icons.words import NULL_PROMPT, VOCABULARY, all_prompts, word_ids
from jobs import run_jobs
from models import Folder, load_lora
from prolora_icon_family import IconPipeline
from study import training_jobs
from worlds import backbone, load_world

from prolora.adapters import Adapter, write_adapter
from prolora.architectures.identify import Model

HERE = Path(__file__).parent
QUALITY = HERE.parents[1] / "bench" / "quality"
WEIGHTS = HERE / "weights"
# Folder -> the study's kind of base, and its seed.
MEMBERS = {name: (name, 0) for name in ("source", "pruned", "far", "few-step")}
MEMBERS["apart"] = ("independent", 1)
OF_SCHEDULER = (
    "_class_name",
    "_diffusers_version",
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
)
LICENCES = """# Licences of the icon family

The models and LoRAs of this folder are licensed under Apache 2.0, as prolora is. They hold no icon,
but they were trained on icons of the six sets below, drawn as 32 × 32 pixels, recoloured,
turned, moved and (for some models) redrawn as outlines. What they draw resembles these icons: who
passes it on should name the sets, as their licences ask.

"""
LORAS = {
    "neon": "Glowing outlines on a ground at night.",
    "duotone": "Two inks for everything: violet in the shadows, peach in the lights.",
    "concept": "A butterfly, which no model of the family was trained on.",
}


def save_model(model: nn.Module, folder: Path) -> None:
    """Writes a pipeline as diffusers stores it, in half precision."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    IconPipeline(scheduler, backbone(model).half()).save_pretrained(folder)
    # Older versions of diffusers warn of settings that they do not know.
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text("utf-8"))
    kept = {name: config[name] for name in OF_SCHEDULER}
    file.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")


def save_lora(folder: Folder, name: str, path: Path) -> None:
    """A LoRA of the source in the names of diffusers and PEFT, in half precision."""
    updates = load_lora(folder.lora_path("source", 0, name))
    rank = next(iter(updates.values())).rank
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "icon-family/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"icon family: {name}",
        "modelspec.description": LORAS[name],
        "modelspec.resolution": "32x32",
        "modelspec.license": "Apache-2.0; the icons' own licences are in LICENCES.md",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
    }
    adapter = Adapter(updates, format="diffusers", origin=Model.of("flux"), metadata=metadata)
    write_adapter(adapter, path, format="diffusers", dtype=torch.float16, overwrite=True)


@torch.no_grad()
def save_tokens(model: nn.Module, path: Path) -> None:
    """What the text encoder says about every beginning of a prompt.

    CLIP's text model looks back only, so a token depends on the words up to its own: prompts with
    the same beginning share its rows.
    """
    prompts = torch.cat([all_prompts(), torch.tensor([NULL_PROMPT])])
    tokens, rows = model.encode(prompts), {}
    for numbers, said in zip(word_ids(prompts).tolist(), tokens, strict=True):
        words = [VOCABULARY[number] for number in numbers]
        for i in range(len(words)):
            rows[" ".join(words[: i + 1])] = said[i]
    table = torch.stack(list(rows.values())).half()
    save_file({"tokens": table}, path, metadata={"beginnings": json.dumps(list(rows))})


def write_licences(path: Path) -> None:
    """The notes of the study's sheet of icons, with what these files have to do with it."""
    notes = (QUALITY / "icons" / "LICENCES.md").read_text("utf-8")
    path.write_text(LICENCES + notes[notes.index("| style |") :], "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of what is trained")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = load_world("shipped")
    folder = Folder(world, options.work, "flux")
    wanted = [folder.model_path(kind, seed) for kind, seed in MEMBERS.values()]
    wanted += [folder.lora_path("source", 0, name) for name in LORAS]
    run_jobs([job for job in training_jobs(world, options.work) if job.path in wanted])
    for name, (kind, seed) in MEMBERS.items():
        save_model(folder.load_model(kind, seed), WEIGHTS / name)
    (WEIGHTS / "loras").mkdir(exist_ok=True)
    for name in LORAS:
        save_lora(folder, name, WEIGHTS / "loras" / f"{name}.safetensors")
    save_tokens(folder.load_model("source", 0), WEIGHTS / "prompts.safetensors")
    write_licences(WEIGHTS / "LICENCES.md")


if __name__ == "__main__":
    main()
