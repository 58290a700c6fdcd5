"""A LoRA of one base in a diffusers pipeline of another, without a file.

    python examples/diffusers_pipeline.py PIPELINE SOURCE LORA -o image.png --prompt "…"

PIPELINE and SOURCE are folders of diffusers pipelines, or ids on the Hugging Face Hub.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

import prolora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", help="the base that you use")
    parser.add_argument("source", help="the base that the LoRA was trained on")
    parser.add_argument("lora", help="the LoRA")
    parser.add_argument("-o", "--out", required=True, help="the image")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    pipe = DiffusionPipeline.from_pretrained(options.pipeline)
    report = prolora.load_moved_lora(pipe, options.lora, options.source, adapter_name="moved")
    print(report)
    generator = torch.Generator().manual_seed(options.seed)
    image = pipe(options.prompt, num_inference_steps=options.steps, generator=generator).images[0]
    image.save(options.out)


if __name__ == "__main__":
    main()
