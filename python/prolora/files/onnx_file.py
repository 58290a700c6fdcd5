"""ONNX files: the weights of an exported network, by the names that its modules had."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedFormat, input_error
from .outside import open_regular
from .state import FileState

# What protocol buffers hold at most, and so a model with its weights inside.
_LARGEST = 2 << 30
# ONNX's number of a type -> torch's dtype.
_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
    17: torch.float8_e4m3fn,
    19: torch.float8_e5m2,
}
# Layers whose second input is a weight, and those that store it [in, out].
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_EXTERNAL = 1


@dataclass(frozen=True)
class OnnxTensor:
    """One initializer.

    Attributes:
        dtype: as stored.
        shape: rows first, as torch has it.
        transposed: it is stored [in, out].
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    transposed: bool


class OnnxFile:
    """The initializers of an ONNX file that have the names of parameters.

    Exporters give the names of modules to what they leave as it was, and names of their own,
    without a dot, to constants and to what they computed: norms folded into products and sums are
    not here.

    Attributes:
        path: the file.
        tensors: name -> `OnnxTensor`, in the order of the file.
        state: of the file, when it was read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the file, which protocol buffers do as a whole.

        Raises:
            UnsupportedFormat: no ONNX model, one whose weights are quantised, lie in another file
                or have lost their names, or `onnx` is not installed.
        """
        self.path = Path(path)
        with open_regular(self.path, _LARGEST) as file:
            self.state = FileState.from_status(os.fstat(file.fileno()))
            try:
                content = file.read()
            except OSError as error:
                raise input_error(path, error) from error
        graph = _parse_graph(content, self.path)
        self._stored = {one.name: one for one in graph.initializer if "." in one.name}
        if len(self._stored) != sum("." in one.name for one in graph.initializer):
            raise UnsupportedFormat(f"{self.path}: is damaged: a weight occurs twice")
        transposed = _find_transposed(graph, self.path)
        self.tensors = {
            name: _describe(stored, name in transposed, self.path)
            for name, stored in self._stored.items()
        }

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in memory of its own.

        Raises:
            KeyError: no such tensor.
        """
        info = self.tensors[name]
        stored = info.shape[::-1] if info.transposed else info.shape
        content = bytearray(self._stored[name].raw_data)
        flat = torch.frombuffer(content, dtype=info.dtype) if content else torch.empty(0)
        tensor = flat.to(info.dtype).reshape(stored)
        return tensor.mT.contiguous() if info.transposed else tensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along the first axis."""
        if not self.tensors[name].shape or not 0 <= start <= stop <= self.tensors[name].shape[0]:
            raise IndexError(f"{self.path}: rows {start}:{stop} of {name}")
        return self.read(name)[start:stop]


def _parse_graph(content: bytes, path: Path) -> Any:
    """The graph of a model."""
    onnx = load_onnx(path)
    try:
        graph = onnx.load_model_from_string(content).graph
    except Exception as error:  # protobuf's own class, which it does not export
        raise UnsupportedFormat(f"{path}: is not an ONNX model, or is damaged: {error}") from error
    if not graph.initializer:
        raise UnsupportedFormat(f"{path}: is not an ONNX model with weights in it")
    texts = [one.name for one in graph.initializer]
    for node in graph.node:
        texts += [node.op_type, node.name, *node.input, *node.output]
    if not all(isinstance(text, str) for text in texts):  # bytes, where they are no UTF-8
        raise UnsupportedFormat(f"{path}: is damaged: a name in it is not text; download it again")
    kinds = [node.op_type for node in graph.node]
    quantised = [kind for kind in kinds if "quantize" in kind.lower() or kind.endswith("Integer")]
    if quantised:
        raise UnsupportedFormat(
            f"{path}: its weights are quantised ({quantised[0]}); use the model as it was exported"
        )
    return graph


def load_onnx(path: Path) -> Any:
    """The package `onnx`.

    Raises:
        UnsupportedFormat: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise UnsupportedFormat(
            f"{path}: ONNX files are read with the package onnx; pip install 'prolora[onnx]'"
        ) from error
    return onnx


def _find_transposed(graph: Any, path: Path) -> set[str]:
    """The weights that are stored [in, out].

    Raises:
        UnsupportedFormat: the weight of a layer has no name of a module.
    """
    nameless = {one.name for one in graph.initializer if "." not in one.name and len(one.dims) > 1}
    transposed: set[str] = set()
    straight: set[str] = set()
    for node in graph.node:
        if node.op_type not in _LAYERS or len(node.input) < 2:
            continue
        weight = node.input[1]
        if weight in nameless:
            raise UnsupportedFormat(
                f"{path}: the weight of the layer {node.name or node.output[0]} has lost its name "
                f"({weight}) in the export; give the checkpoint that was exported"
            )
        turned = any(one.name == "transB" and one.i for one in node.attribute)
        flat = node.op_type == "MatMul" or (node.op_type == "Gemm" and not turned)
        (transposed if flat else straight).add(weight)
    if both := transposed & straight:
        raise UnsupportedFormat(f"{path}: {min(both)} is used both as stored and transposed")
    return transposed


def _describe(stored: Any, transposed: bool, path: Path) -> OnnxTensor:
    """What the file says of one initializer, checked against its bytes."""
    dtype, shape = _DTYPES.get(stored.data_type), tuple(int(size) for size in stored.dims)
    if stored.data_location == _EXTERNAL:
        raise UnsupportedFormat(
            f"{path}: {stored.name} lies in another file; save the model with its weights inside, "
            "or give the checkpoint that was exported"
        )
    if dtype is None:
        raise UnsupportedFormat(f"{path}: {stored.name} has the unknown type {stored.data_type}")
    if not stored.raw_data and shape.count(0) == 0:
        stored.raw_data = _pack(stored, path)
    if any(size < 0 for size in shape) or len(shape) > 16:
        raise UnsupportedFormat(f"{path}: {stored.name} has an impossible shape")
    if len(stored.raw_data) != math.prod(shape) * dtype.itemsize:
        raise UnsupportedFormat(
            f"{path}: {stored.name} has {len(stored.raw_data)} bytes, which do not fit its shape "
            f"{list(shape)!r:.80}; the file is damaged"
        )
    turned = transposed and len(shape) == 2
    return OnnxTensor(dtype, shape[::-1] if turned else shape, turned)


def _pack(stored: Any, path: Path) -> bytes:
    """The bytes of an initializer that lists its numbers one by one."""
    try:
        array = load_onnx(path).numpy_helper.to_array(stored)
    except (ValueError, TypeError) as error:
        raise UnsupportedFormat(f"{path}: {stored.name} is damaged: {error}") from error
    return bytes(array.tobytes())
