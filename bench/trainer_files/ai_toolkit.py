"""ai-toolkit: LoRASpecialNetwork of toolkit/lora_special.py, and the keys of each model's class.

The settings are the defaults: type lora, transformer_only, no text encoders, here with a rank for
convolutions too ("conv: 4"), as in the examples of its config folder. Models of diffusers are made
from diffusers' classes with the published configuration, the others from ai-toolkit's own with the
configuration in its code. LoKr and DoRA are not here: a `Cell` cannot represent them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from loader_programs.common import enter
from torch import Tensor, nn

from . import RANK, Cell
from .musubi_tuner import find_modules

sys.path.append(str(Path(__file__).parents[2] / "tests/support"))

from make_layouts import build_model
from published_models import PUBLISHED
from published_unets import UNETS
from published_videos import VIDEOS

LDM = (".lora_down.weight", ".lora_up.weight", ".alpha")
PEFT = (".lora_A.weight", ".lora_B.weight")
EMPTY = (
    "torchvision optimum oyaml albumentations torchao torchaudio cv2 lpips k_diffusion open_clip "
    "timm controlnet_aux lycoris prodigyopt bitsandbytes flatten_json omegaconf einops ftfy av "
    "imageio soundfile scipy kornia sentencepiece wandb dotenv gguf librosa matplotlib easydict"
)
OWN = "extensions_built_in.diffusion_models."
Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Model:
    """A model that ai-toolkit trains.

    Attributes:
        name: the class of the model, or the flags of toolkit/stable_diffusion_model.py.
        module: of the class; "" for StableDiffusion.
        build: makes the base on the meta device.
        targets: names of the classes whose layers are trained.
        flags: arguments of the network, for example "is_flux".
    """

    name: str
    module: str
    family: str
    layout: str
    build: Build
    targets: str = ""
    flags: tuple[str, ...] = ()


def of_diffusers(layout: str) -> Build:
    return lambda: build_model({**PUBLISHED, **VIDEOS, **UNETS}[layout])


def of_values(name: str, **values: int) -> Build:
    """Makes a class of diffusers with the values of the published configuration."""
    return lambda: getattr(importlib.import_module("diffusers"), name)(**values)  # type: ignore[no-any-return]


def of_own(module: str, name: str, *configs: str) -> Build:
    """Makes ai-toolkit's class; `configs` name its configuration, and a class to give it to."""

    def build() -> nn.Module:
        code = importlib.import_module(OWN + module)
        arguments: list[Any] = []
        for config in configs:
            found = getattr(code, config)
            if isinstance(found, Mapping):
                arguments = [found]
            elif not isinstance(found, type):
                arguments = [found]
            elif arguments:
                arguments = [found(**arguments[0])]
            else:
                arguments = [found()]
        return getattr(code, name)(*arguments)  # type: ignore[no-any-return]

    return build


def build_pair() -> nn.Module:
    module = importlib.import_module(OWN + "wan22.wan22_14b_model")
    models = [of_diffusers("wan2.2-i2v-14b")() for _ in range(2)]
    return module.DualWanTransformer3DModel(*models)  # type: ignore[no-any-return]


def build_anima(layout: str) -> nn.Module:
    module = importlib.import_module(OWN + "anima.anima")
    return module.AnimaTrainableModel(of_diffusers(layout)(), nn.Identity())  # type: ignore[no-any-return]


def of_flag(layout: str, family: str, flag: str) -> Model:
    flags = (flag,) if flag else ()
    return Model(f"StableDiffusion, {layout}", "", family, layout, of_diffusers(layout), "", flags)


WAN = "WanTransformer3DModel"
QWEN = "QwenImageTransformer2DModel"
MODELS = (
    of_flag("sd15", "sd15", ""),
    of_flag("sd21", "sd21", "is_v2"),
    of_flag("sdxl", "sdxl", "is_sdxl"),
    of_flag("ssd-1b", "ssd-1b", "is_ssd"),
    of_flag("segmind-vega", "segmind-vega", "is_vega"),
    of_flag("sd3-medium", "sd3", "is_v3"),
    of_flag("sd3.5-large", "sd3", "is_v3"),
    of_flag("pixart-alpha", "pixart", "is_pixart"),
    of_flag("pixart-sigma", "pixart", "is_pixart"),
    of_flag("auraflow", "auraflow", "is_auraflow"),
    of_flag("flux1-dev", "flux", "is_flux"),
    of_flag("flux1-schnell", "flux", "is_flux"),
    of_flag("lumina2", "lumina2", "is_lumina2"),
    *(
        Model("Wan21", "toolkit.models.wan21", "wan", layout, of_diffusers(layout), WAN)
        for layout in ("wan-t2v-1.3b", "wan-t2v-14b")
    ),
    Model(
        "Wan21I2V",
        "toolkit.models.wan21",
        "wan",
        "wan2.1-i2v-14b",
        of_diffusers("wan2.1-i2v-14b"),
        WAN,
    ),
    Model(
        "Wan225bModel", OWN + "wan22", "wan", "wan2.2-ti2v-5b", of_diffusers("wan2.2-ti2v-5b"), WAN
    ),
    Model(
        "Wan2214bI2VModel",
        OWN + "wan22",
        "wan",
        "wan2.2-i2v-14b",
        build_pair,
        "DualWanTransformer3DModel",
    ),
    *(
        Model(
            name, OWN + "qwen_image", "qwen-image", "qwen-image", of_diffusers("qwen-image"), QWEN
        )
        for name in ("QwenImageModel", "QwenImageEditModel", "QwenImageEditPlusModel")
    ),
    Model(
        "FluxKontextModel",
        OWN + "flux_kontext",
        "flux",
        "flux1-dev",
        of_diffusers("flux1-dev"),
        "FluxTransformer2DModel",
    ),
    *(
        Model(
            name,
            OWN + "hidream",
            "hidream",
            "hidream-i1",
            of_diffusers("hidream-i1"),
            "HiDreamImageTransformer2DModel",
        )
        for name in ("HidreamModel", "HidreamE1Model")
    ),
    *(
        Model(
            name, OWN + "ltx2", "ltx2", layout, of_diffusers(layout), "LTX2VideoTransformer3DModel"
        )
        for name, layout in (
            ("LTX2Model", "ltx2"),
            ("LTX23Model", "ltx2.3"),
            ("LTX25Model", "ltx2.5"),
        )
    ),
    Model(
        "ZImageModel",
        OWN + "z_image",
        "z-image",
        "z-image",
        of_diffusers("z-image"),
        "ZImageTransformer2DModel",
    ),
    *(
        Model(
            "AnimaModel",
            OWN + "anima",
            "cosmos",
            layout,
            lambda id_=layout: build_anima(id_),
            "CosmosTransformer3DModel",
        )
        for layout in ("anima", "anima-2.9b")
    ),
    Model(
        "ChromaModel",
        OWN + "chroma",
        "chroma",
        "chroma",
        of_own("chroma.src.model", "Chroma", "chroma_params"),
        "Chroma",
    ),
    Model(
        "ChromaRadianceModel",
        OWN + "chroma",
        "chroma",
        "chroma-radiance",
        of_own("chroma.src.radiance", "Chroma", "chroma_params"),
        "Chroma",
    ),
    *(
        Model(
            name,
            OWN + "flux2",
            "flux2",
            layout,
            of_own("flux2.src.model", "Flux2", config),
            "Flux2",
        )
        for name, layout, config in (
            ("Flux2Model", "flux2-dev", "Flux2Params"),
            ("Flux2Klein4BModel", "flux2-klein-4b", "Klein4BParams"),
            ("Flux2Klein9BModel", "flux2-klein-9b", "Klein9BParams"),
        )
    ),
    Model(
        "Krea2Model",
        OWN + "krea2",
        "krea2",
        "krea2",
        of_own("krea2.krea2", "SingleStreamDiT", "KREA2_MMDIT_CONFIG", "SingleMMDiTConfig"),
        "SingleStreamDiT",
    ),
    Model(
        "Ideogram4Model",
        OWN + "ideogram4",
        "ideogram4",
        "ideogram4",
        of_own("ideogram4.ideogram4", "Ideogram4Transformer2DModel", "Ideogram4Config"),
        "Ideogram4Transformer2DModel",
    ),
    Model(
        "MageFlowModel",
        OWN + "mageflow",
        "mageflow",
        "mageflow",
        of_own("mageflow.mageflow", "MageFlow", "MageFlowParams"),
        "MageFlow",
    ),
    Model(
        "MinimaxH3Model",
        OWN + "minimax_h3",
        "minimax-h3",
        "minimax-h3",
        of_own("minimax_h3.minimax_h3", "MiniMaxH3Transformer", "MiniMaxH3TransformerParams"),
        "MiniMaxH3Transformer",
    ),
    Model(
        "ErnieImageModel",
        OWN + "ernie_image",
        "ernie-image",
        "ernie-image",
        of_values(
            "ErnieImageTransformer2DModel",
            hidden_size=4096,
            num_attention_heads=32,
            num_layers=36,
            ffn_hidden_size=12288,
            text_in_dim=3072,
        ),
        "ErnieImageTransformer2DModel",
    ),
    Model(
        "BooguImageModel",
        OWN + "boogu_image",
        "boogu-image",
        "boogu-image",
        of_own("boogu_image.boogu_image", "BooguImageTransformer2DModel"),
        "BooguImageTransformer2DModel",
    ),
    Model(
        "OmniGen2Model",
        OWN + "omnigen2",
        "omnigen2",
        "omnigen2",
        of_own("omnigen2", "OmniGen2Transformer2DModel"),
        "OmniGen2Transformer2DModel",
    ),
    Model(
        "NucleusImageModel",
        OWN + "nucleus_image",
        "",
        "",
        of_own("nucleus_image.nucleus_image_model", "NucleusMoEImageTransformer2DModel"),
        "NucleusMoEImageTransformer2DModel",
    ),
    Model(
        "PRXPixelT2IModel",
        OWN + "prx_pixel_t2i",
        "",
        "",
        of_own("prx_pixel_t2i.prx_pixel_t2i", "PRXTransformer2DModel"),
        "PRXTransformer2DModel",
    ),
    Model("FLiteModel", OWN + "f_light", "", "", of_own("f_light.f_light", "DiT"), "DiT"),
    Model(
        "CogView4",
        "toolkit.models.cogview4",
        "cogview4",
        "cogview4",
        of_values(
            "CogView4Transformer2DModel",
            num_layers=28,
            attention_head_dim=128,
            num_attention_heads=32,
        ),
        "CogView4Transformer2DModel",
    ),
)


def list_cells(checkout: Path) -> Iterator[Cell]:
    enter(checkout, *EMPTY.split())
    # A module that diffusers has renamed, for writing videos.
    sys.modules.setdefault("diffusers.pipelines.ltx2.export_utils", MagicMock())
    yield from map(make_cell, MODELS)


def make_cell(model: Model) -> Cell:
    """Makes the network as BaseSDTrainProcess.py does, and the keys as it saves them."""
    several = sum(one.name == model.name for one in MODELS) > 1
    name = f"{model.name}, {model.layout}" if several else model.name
    fields = {"model": name, "family": model.family, "layout": model.layout}
    code = importlib.import_module(model.module or "toolkit.stable_diffusion_model")
    cls: Any = getattr(code, model.name if model.module else "StableDiffusion")
    wrapper = cls.__new__(cls)  # its __init__ would load the weights
    vars(wrapper).update(train_text_conditioner=False, train_high_noise=True, train_low_noise=True)
    wrapper.model_config = SimpleNamespace(model_kwargs={})
    if not hasattr(wrapper, "use_old_lokr_format"):
        wrapper.use_old_lokr_format = True
    with torch.device("meta"):
        try:
            base = model.build()
        except (TypeError, RuntimeError) as error:  # its values are in the published model alone
            note = f"the class has no configuration of its own: {error}"
            return Cell(**fields, how="not obtainable", note=note[:200])
        network = make_network(model, wrapper, base)
        network.apply_to([], base, False, True)
    with patch.object(Tensor, "to", lambda tensor, *_: tensor):  # a meta tensor cannot leave
        state = network.get_state_dict()
    if hasattr(wrapper, "save_lora"):
        state = catch_save(wrapper, network, state)
    suffixes = PEFT if network.peft_format else LDM
    return Cell(
        **fields,
        how="network class",
        note=f"LoRASpecialNetwork on {type(base).__name__}",
        modules=find_modules(state, suffixes),
        suffixes=suffixes,
    )


def make_network(model: Model, wrapper: Any, base: nn.Module) -> Any:
    config = importlib.import_module("toolkit.config_modules").NetworkConfig(
        linear=RANK, linear_alpha=RANK, conv=RANK, conv_alpha=RANK
    )
    create = importlib.import_module("toolkit.lora_special").LoRASpecialNetwork
    targets = {"target_lin_modules": [model.targets]} if model.targets else {}
    flags = {flag: True for flag in model.flags}
    return create(
        text_encoder=[],
        unet=base,
        lora_dim=RANK,
        alpha=RANK,
        conv_lora_dim=RANK,
        conv_alpha=RANK,
        train_text_encoder=False,
        network_config=config,
        transformer_only=config.transformer_only,
        is_transformer=bool(model.module),
        base_model=wrapper,
        is_ssd=model.layout == "ssd-1b",
        is_vega=model.layout == "segmind-vega",
        **{key: value for key, value in flags.items() if key not in ("is_ssd", "is_vega")},
        **targets,
    )


def catch_save(wrapper: Any, network: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the first of the files that a model writes itself, for Wan 2.2 the high noise one."""
    wrapper.network = network
    files: list[dict[str, Tensor]] = []
    module = sys.modules[type(wrapper).save_lora.__module__]
    with patch.object(module, "save_file", lambda tensors, *_, **__: files.append(tensors)):
        wrapper.save_lora(state, "lora.safetensors", {})
    return files[0]
