"""The models whose tables are made from diffusers' classes, with the configurations they have."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Published:
    """A published size of a model.

    Attributes:
        title: for people.
        cls: its class in diffusers.
        billions: parameters in all, as the class makes them: what is published, to more digits.
        source: where its configuration is known from.
        config: what differs from the defaults of the class.
        text_encoders: what it reads, in order.
        attached: part of its files that is another model in diffusers -> the class of that.
    """

    title: str
    cls: str
    billions: float
    source: str
    config: dict[str, object] = field(default_factory=dict)
    text_encoders: tuple[str, ...] = ()
    attached: dict[str, str] = field(default_factory=dict)


DEFAULTS = "the defaults of the class"
FLUX2 = "FLUX.2's repository, src/flux2/model.py; no embedding of guidance, as ComfyUI detects them"
PUBLISHED = {
    "flux1-dev": Published(
        "FLUX.1 [dev]",
        "FluxTransformer2DModel",
        11.9,
        "diffusers, scripts/convert_flux_to_diffusers.py",
        {"guidance_embeds": True},
        ("clip-l", "t5-xxl"),
    ),
    "flux1-schnell": Published(
        "FLUX.1 [schnell]", "FluxTransformer2DModel", 11.9, DEFAULTS, {}, ("clip-l", "t5-xxl")
    ),
    "qwen-image": Published(
        "Qwen-Image", "QwenImageTransformer2DModel", 20.4, DEFAULTS, {}, ("qwen2.5-vl-7b",)
    ),
    "z-image": Published("Z-Image", "ZImageTransformer2DModel", 6.2, DEFAULTS, {}, ("qwen3-4b",)),
    "flux2-dev": Published(
        "FLUX.2 [dev]", "Flux2Transformer2DModel", 32.2, DEFAULTS, {}, ("mistral-small-24b",)
    ),
    "flux2-klein-9b": Published(
        "FLUX.2 [klein] 9B",
        "Flux2Transformer2DModel",
        9.1,
        FLUX2,
        {
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
            "guidance_embeds": False,
        },
        ("qwen3-8b",),
    ),
    "flux2-klein-4b": Published(
        "FLUX.2 [klein] 4B",
        "Flux2Transformer2DModel",
        3.9,
        FLUX2,
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        ("qwen3-4b",),
    ),
}
