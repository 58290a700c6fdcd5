"""Small LoRAs in every spelling, and what diffusers makes of them."""

import gzip
import json
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import prolora
from prolora import Adapter, LowRank
from prolora.architectures.identify import Model
from prolora.architectures.layouts import load_layout
from prolora.architectures.modules import find_block, is_attention

DATA = Path(__file__).parent / "keymaps.json.gz"

# Modules of `tiny_unet`, canonical: linear layers, a 1×1 and 3×3 convolutions.
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
DEEP = "down_blocks.2.attentions.1.transformer_blocks.1"
UP = "up_blocks.0.attentions.2.transformer_blocks.0"
LINEAR = {
    f"{BLOCK}.attn1.to_q": (16, 16),
    f"{BLOCK}.attn2.to_k": (16, 24),
    f"{BLOCK}.attn1.to_out.0": (16, 16),
    f"{DEEP}.ff.net.0.proj": (256, 32),
    f"{UP}.attn2.to_v": (32, 24),
    "mid_block.attentions.0.proj_in": (32, 32),
}
CONV = {
    "down_blocks.1.resnets.0.conv1": (16, 8, 3, 3),
    "down_blocks.1.resnets.0.conv_shortcut": (16, 8, 1, 1),
    "up_blocks.0.upsamplers.0.conv": (32, 32, 3, 3),
}


@cache
def keymaps():
    """{"unets": {model: {module: [kohya, kohya SGM, ldm, shape]}}, "clip": {model: {…}}}."""
    return json.loads(gzip.decompress(DATA.read_bytes()))


def tiny_unet_config():
    """SDXL's blocks at a hundredth of its width, with fewer layers in the deepest."""
    return dict(
        sample_size=8,
        block_out_channels=(8, 16, 32),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 2, 4),
        use_linear_projection=True,
        cross_attention_dim=24,
        norm_num_groups=4,
    )


def factors(shape, rank, seed, dtype=torch.float32):
    """(up [out, r], down [r, in]) or their convolution shapes."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, generator=generator)
    down = torch.randn(rank, *shape[1:], generator=generator)
    return up.reshape(*up.shape, *[1] * (len(shape) - 2)).to(dtype), down.to(dtype)


def pair(stem, shape, rank=4, seed=0, dtype=torch.float32, ends=("lora_up", "lora_down")):
    """{key: factor} of one module in a file."""
    both = zip(ends, factors(shape, rank, seed, dtype), strict=True)
    return {f"{stem}.{end}.weight": factor for end, factor in both}


def adapter_of(shapes, rank=4, **fields):
    """An adapter with random updates; `rank` is a number or a list that is cycled through."""
    ranks = rank if isinstance(rank, list) else [rank]
    updates, kernels = {}, {}
    for seed, (name, shape) in enumerate(shapes.items()):
        up, down = factors(shape, ranks[seed % len(ranks)], seed)
        updates[name] = LowRank(up.flatten(1), down.flatten(1))
        if len(shape) == 4:
            kernels[name] = tuple(shape[2:])
    return Adapter(updates, kernels, **fields)


def usual_lora(layout, prefix):
    """A LoRA of rank 1 on the attention and feed-forward of a published size; takes no memory."""
    return lora_on(layout, prefix, load_layout(layout).adapted)


def attention_lora(layout, prefix="transformer.", keep=lambda block: True):
    """The same on the attention in all blocks, or in those that are kept."""
    names = (name for name in load_layout(layout).shapes if is_attention(name))
    return lora_on(layout, prefix, [n for n in names if (at := find_block(n)) and keep(at)])


def lora_on(layout, prefix, names):
    """A LoRA of rank 1 on the matrices among some modules; takes no memory."""
    shapes, one, tensors = load_layout(layout).shapes, torch.ones(1), {}
    for name in names:
        if len(shapes[name]) == 2:
            out, inputs = shapes[name]
            tensors[f"{prefix}{name}.lora_A.weight"] = one.expand(1, inputs)
            tensors[f"{prefix}{name}.lora_B.weight"] = one.expand(out, 1)
    return tensors


def empty_base(layout):
    """A published model in memory; takes none."""
    zero, shapes = torch.zeros(1), load_layout(layout).shapes
    return {f"{name}.weight": zero.expand(shape) for name, shape in shapes.items()}


def adapter_for(family, updates, **fields):
    """An adapter that is of a family for certain."""
    return Adapter(updates, origin=Model.of(family), **fields)


def dense(adapter):
    """Module -> ΔW."""
    return {name: update.dense() for name, update in adapter.updates.items()}


def random(*shape, seed=0):
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save(path, tensors, metadata=None):
    """A safetensors file; gives the path back."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def read_header(path):
    """The metadata of a file, read by the library of the format."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_lora(lora):
    """The updates and vectors of a file, folder or state dict, as `convert` reads them."""
    return prolora.convert(lora).adapter


def same_bits(one, other):
    """Whether state dicts, files or updates by module hold the same, to the last bit, and some."""
    one, other = map(_list_tensors, (one, other))
    return one.keys() == other.keys() > set() and all(torch.equal(one[k], other[k]) for k in one)


def _list_tensors(stored):
    stored = load_file(stored) if isinstance(stored, str | Path) else stored
    parts = {k: {"": x} if isinstance(x, torch.Tensor) else vars(x) for k, x in stored.items()}
    return {(key, part): x for key, some in parts.items() for part, x in some.items()}


def kohya_file(path, rank=4, alpha=None, metadata=None):
    """One linear module in kohya's spelling."""
    up, down = factors((6, 5), rank, 0)
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
    if alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return save(path, tensors, metadata)


def relative_error(found, wanted):
    """‖found − wanted‖ / ‖wanted‖."""
    return ((found - wanted).norm() / wanted.norm()).item()


def attached(model):
    """Module name -> ΔW [out, in·kh·kw] of the LoRA that PEFT attached to a model."""
    updates = {}
    for name, module in model.named_modules():
        if getattr(module, "lora_A", None):
            updates[name] = module.get_delta_weight(next(iter(module.lora_A))).detach().flatten(1)
    return updates


def same_updates(adapter, found, tolerance=1e-6):
    """Asserts that `found` are exactly the updates of `adapter`."""
    assert set(found) == set(adapter.updates)
    for name, update in adapter.updates.items():
        assert relative_error(found[name], update.dense()) < tolerance, name


def tiny_unet():
    """A fresh UNet with SDXL's blocks."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(**tiny_unet_config())


def through_diffusers(path, unet=None):
    """Module name -> ΔW after diffusers' own loader attached a file to a UNet."""
    from types import SimpleNamespace

    from diffusers import StableDiffusionXLPipeline

    unet = unet or tiny_unet()
    state, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
        str(path), unet_config=SimpleNamespace(layers_per_block=2), return_lora_metadata=True
    )
    unet.load_lora_adapter(state, network_alphas=alphas, metadata=metadata, prefix="unet")
    return attached(unet)
