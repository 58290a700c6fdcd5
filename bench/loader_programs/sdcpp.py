"""stable-diffusion.cpp: its conversion of names, compiled."""

from __future__ import annotations

import itertools
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from prolora.architectures.family import Family

from .common import Keys, Open, Read, name_weights
from .text_encoders import list_weights

SDCPP_VERSIONS = {
    "chroma": "VERSION_FLUX",
    "hidream-o1": "VERSION_HIDREAM_O1",
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


def open_program(checkout: Path) -> Open:
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
        texts = list_weights(layout)
        stored = [f"model.diffusion_model.{name}" for name in shapes]
        stored += [f"text_encoders.{name}" for name in texts]
        converted = convert(version, stored)
        weights = dict(zip(converted, [*shapes.values(), *texts.values()], strict=True))

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
