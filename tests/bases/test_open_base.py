"""Base models in all the forms they come in, and the forms that are refused."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import name_in_ldm
from torch import Tensor

from prolora import Base, open_base
from prolora.architectures import layouts
from prolora.bases import check_finite, open_pair
from prolora.errors import NonFiniteWeights, UnsupportedFormat
from prolora.files.safetensors_writing import write_safetensors

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
K = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.0.resnets.0.conv1"
FULL = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    """Three weights and a bias in diffusers' names."""
    return {
        f"{Q}.weight": torch.full((4, 4), value).half(),
        f"{K}.weight": torch.full((4, 6), value).half(),
        f"{CONV}.weight": torch.full((2, 3, 3, 3), value).half(),
        f"{CONV}.bias": torch.full((2,), value).half(),
    }


def write(path: Path, content: dict[str, Tensor], **metadata: str) -> Path:
    """A safetensors file, its folder made where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, content, metadata, overwrite=True)
    return path


def empty_layout(id_: str) -> dict[str, Tensor]:
    """Zeros with the names and shapes of a layout, all of one element in memory."""
    zero = torch.zeros(1, dtype=torch.float8_e4m3fn)
    return {name: zero.expand(shape) for name, shape in layouts.load_layout(id_).shapes.items()}


def assert_opened(base: Base, value: float = 1.0) -> None:
    """The three weights of `tensors` and nothing else."""
    assert base.shapes == {Q: (4, 4), K: (4, 6), CONV: (2, 3, 3, 3)}
    assert set(base.dtypes.values()) == {torch.float16}
    assert base.read(K).dtype == torch.float16
    assert torch.equal(base.read(K), torch.full((4, 6), value).half())
    assert base.layout is None


def test_a_pipeline_folder_and_its_unet_folder_are_the_same_base(tmp_path: Path) -> None:
    """Named after the model: every UNet folder has the same name."""
    file = write(tmp_path / "mine" / "unet" / FULL, tensors())
    (tmp_path / "mine" / "model_index.json").write_text("{}")
    for path in (tmp_path / "mine", tmp_path / "mine" / "unet"):
        base = open_base(path)
        assert_opened(base)
        assert (base.name, base.path, base.files) == ("mine", path, [file])
        assert base.tensor_name(Q) == f"{FULL}:{Q}.weight"
        assert open_base(base) is base


def test_a_transformer_or_a_named_part_is_found(tmp_path: Path) -> None:
    """Both at once are ambiguous."""
    write(tmp_path / "transformer" / FULL, tensors())
    assert_opened(open_base(str(tmp_path)))
    write(tmp_path / "unet" / FULL, tensors(2))
    with pytest.raises(UnsupportedFormat, match="both unet and transformer"):
        open_base(tmp_path)
    assert_opened(open_base(tmp_path, subfolder="unet"), 2)
    text = {"text_model.q.weight": torch.ones(2, 2)}
    write(tmp_path / "text_encoder" / "model.safetensors", text)
    assert list(open_base(tmp_path, subfolder="text_encoder").shapes) == ["text_model.q"]
    with pytest.raises(UnsupportedFormat, match="no folder vae"):
        open_base(tmp_path, subfolder="vae")


def test_of_several_variants_the_plain_one_is_taken_then_fp16(tmp_path: Path) -> None:
    """The doubles of a training run come last."""
    order = ["non_ema", "other", "bf16", "fp16", ""]
    for value, variant in enumerate(order):
        name = FULL.replace(".", f".{variant}.", 1) if variant else FULL
        write(tmp_path / name, tensors(value))
        assert_opened(open_base(tmp_path), value)


def shard(folder: Path, index_name: str = INDEX) -> Path:
    """The weights in two shards and their index."""
    variant = ".fp16" if "fp16" in index_name else ""
    names = [f"diffusion_pytorch_model{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map: dict[str, str] = {}
    for name, part in zip(names, ([Q], [K, CONV]), strict=True):
        keep = {k: t for k, t in tensors().items() if k.rpartition(".")[0] in part}
        write(folder / name, keep)
        weight_map |= dict.fromkeys(keep, name)
    index = folder / index_name
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize(
    "index",
    [
        INDEX,
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
    ],
)
def test_shards_are_one_base(index: str, tmp_path: Path) -> None:
    """In every spelling of the index."""
    shard(tmp_path, index)
    base = open_base(tmp_path)
    assert_opened(base)
    assert len(base.files) == 2
    assert "00001-of-00002" in base.tensor_name(Q) and "00002-of-00002" in base.tensor_name(K)


def test_an_index_that_is_none_or_missing_is_refused(tmp_path: Path) -> None:
    index = shard(tmp_path)
    for text in ("{", "[]", "{}", '{"weight_map": []}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(UnsupportedFormat, match="not an index"):
            open_base(tmp_path)
    index.unlink()
    with pytest.raises(UnsupportedFormat, match="has shards but not their"):
        open_base(tmp_path)


def test_a_single_file_is_read_in_either_spelling(tmp_path: Path) -> None:
    """With and without a prefix, and plain fp8."""
    content, ldm = tensors(), {"first_stage_model.x.weight": torch.ones(2, 2)}
    path = write(tmp_path / "mine.safetensors", content)
    assert (open_base(path).name, open_base(path).files) == ("mine.safetensors", [path])
    assert_opened(open_base(tmp_path))  # the only checkpoint of a folder
    for key, tensor in content.items():
        module, _, end = key.rpartition(".")
        ldm[f"model.diffusion_model.{name_in_ldm(module)}.{end}"] = tensor
    for stored in (content, ldm, {f"unet.{key}": tensor for key, tensor in content.items()}):
        assert_opened(open_base(write(path, stored)))
    write(path, {k: t.to(torch.float8_e5m2) for k, t in ldm.items()})
    assert open_base(path).read(Q).dtype == torch.float8_e5m2
    assert "input_blocks.4.1" in open_base(path).tensor_name(Q)
    write(tmp_path / "other.safetensors", content)
    with pytest.raises(UnsupportedFormat, match=r"several checkpoints \(mine"):
        open_base(tmp_path)


def test_tensors_in_memory_are_used_as_they_are() -> None:
    """A mapping with or without `.weight`, a module, a pipeline."""
    assert_opened(open_base(tensors()))
    assert_opened(open_base({key.removesuffix(".weight"): t for key, t in tensors().items()}))
    linear = torch.nn.Linear(2, 3)
    module = torch.nn.Sequential(linear, torch.nn.Conv2d(2, 3, 1))
    base = open_base(module)
    assert base.shapes == {"0": (3, 2), "1": (3, 2, 1, 1)}
    assert base.read("0").data_ptr() == linear.weight.data_ptr()
    assert not base.read("0").requires_grad
    assert (base.name, base.path, base.files) == ("Sequential", None, [])

    class Pipeline:
        unet = module

    assert open_base(Pipeline()).shapes == base.shapes  # type: ignore[arg-type]


LDM_Q = "input_blocks.4.{}.transformer_blocks.0.attn1.to_q.weight"


def half() -> Tensor:
    """Some weight."""
    return torch.ones(4, 4).half()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"lora_unet_down_blocks_0_x.lora_down.weight": half()}, "is a LoRA"),
        ({f"unet.{Q}.lora_A.weight": half()}, "is a LoRA"),
        ({f"{Q}.base_layer.weight": half()}, "nothing attached"),
        ({f"{Q}.processor.to_q_lora.up.weight": half()}, "is a LoRA"),
        ({f"{Q}.hada_w1_a": half()}, "is a LoRA"),
        ({f"{Q}.weight": half(), f"{Q}.weight_scale_inv": torch.ones(1)}, "quantised"),
        ({f"{Q}.weight": half(), f"{Q}.weight.absmax": torch.ones(1)}, "quantised"),
        ({f"{Q}.weight": torch.ones(4, 4).to(torch.uint8)}, "torch.uint8: models quantised"),
        ({}, "no UNet or transformer"),
        (dict.fromkeys(map(LDM_Q.format, (1, 7)), half()), "belongs to no known module"),
        ({f"{Q}.weight": half(), Q: half()}, "a second weight for"),
    ],
)
def test_what_is_no_plain_base_model_is_refused_with_the_reason(
    content: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    """As a file; the message names it."""
    path = write(tmp_path / "x.safetensors", content)
    with pytest.raises(UnsupportedFormat, match=message) as refused:
        open_base(path)
    assert str(path) in str(refused.value)


def test_sources_that_hold_no_safetensors_are_refused(tmp_path: Path) -> None:
    """No path at all, an empty folder, a pickle, foreign objects."""
    for name in ("not here", str(tmp_path / "x"), "models/sdxl.safetensors"):
        with pytest.raises(UnsupportedFormat, match="no such file, folder or model"):
            open_base(name)
    with pytest.raises(UnsupportedFormat, match=r"no \.safetensors weights"):
        open_base(tmp_path)
    old = tmp_path / "diffusion_pytorch_model.bin"
    torch.save({}, old, _use_new_zipfile_serialization=False)
    for path in (tmp_path, old):
        with pytest.raises(UnsupportedFormat, match="weights_only=True"):
            open_base(path)
    with pytest.raises(UnsupportedFormat, match="not <class 'int'>"):
        open_base(3)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedFormat, match="a is a list, not a tensor"):
        open_base({"a": [1]})  # type: ignore[dict-item]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e5m2])
def test_a_weight_that_is_not_finite_is_named(
    dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    """Tensor, file and place; weights nobody asked for are not read."""
    content = {key: tensor.to(dtype) for key, tensor in tensors().items()}
    bad = torch.ones(4, 6)
    bad[2, 5] = value
    content[f"{K}.weight"] = bad.to(dtype)
    base = open_base(write(tmp_path / "x.safetensors", content))
    check_finite(base, [Q, CONV])
    with pytest.raises(NonFiniteWeights, match=rf"x\.safetensors:{K}.*1 of 24.*\[2, 5\]"):
        check_finite(base, [Q, K])


def test_a_base_prints_in_one_line() -> None:
    """Names and values of thousands of weights are no help in a debugger."""
    assert repr(open_base(tensors())) == "Base('state dict', 3 weights)"
    assert repr(open_base(empty_layout("sd15"))).endswith(" weights, sd15)")


def test_two_bases_of_a_pair_never_have_one_name(tmp_path: Path) -> None:
    file = "checkpoints/mine.safetensors"
    one, two = (write(tmp_path / name / file, tensors()) for name in "ab")
    assert [base.name for base in open_pair(one, two)] == [f"a/{file}", f"b/{file}"]
    assert [base.name for base in open_pair(one, one)] == ["mine.safetensors"] * 2
    in_memory = open_pair(tensors(), tensors())
    assert [base.name for base in in_memory] == ["the source", "the target"]
