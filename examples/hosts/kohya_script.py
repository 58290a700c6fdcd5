"""A script like kohya's: reads only the weights that the LoRA changes, and writes fp16."""

import sys

from safetensors import safe_open

import prolora


def open_lazily(path):
    file = safe_open(path, "pt")
    shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    return prolora.open_base(shapes, read=file.get_tensor)


if __name__ == "__main__":
    source, target, lora, out = sys.argv[1:]
    bases = open_lazily(source), open_lazily(target)
    prolora.transfer(lora, *bases, out=out, format="kohya", dtype="float16")
