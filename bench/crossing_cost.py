"""What probing between pipelines with different VAEs costs on one card, counted.

`python bench/crossing_cost.py` prints the tables of docs/performance.md. Flops and bytes are
counted on models without values (the meta device); fit_memory.py measures the memory of a fit. The
rate of the card is an assumption. Nothing here is measured on a GPU.
It takes a minute or two, and a diffusers that has FLUX.2 and Qwen-Image.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    Flux2Transformer2DModel,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
)
from probe_cost import ATTENTION, FusedAttention, count, flux, match_modules, sdxl
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from prolora.architectures.modules import find_block, is_adaptable
from prolora.probe import FitSettings

RATE = 66.0
"""Tflop/s of an RTX 4090, assumed: 80 % of its peak of 82.6 in float32, in which probing computes
today. It is 40 % of its dense peak of 165 in bfloat16 as well."""
STEPS = 25
IMAGES = (24, 48)
"""Of each origin: the default, and twice as many."""

KL: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
SD15: dict[str, Any] = {"cross_attention_dim": 768, "sample_size": 64}
KLEIN_4B: dict[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}

Sample = dict[str, object]


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside that live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensors, made in (((args, kwargs), False), (result, True)):
            for tensor in tree_leaves(tensors):
                if isinstance(tensor, Tensor):
                    self._add(tensor.untyped_storage(), made)
        return result

    def _add(self, storage: torch.UntypedStorage, made: bool) -> None:
        """Adds memory that was not seen before; what an operation reads was made outside."""
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes() if made else 0
            self.live += self.sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def count_forward(run: Callable[[], object]) -> tuple[float, float]:
    """Tflop of a run without gradients, and the peak of its tensors in GB."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), FusedAttention() as fused, counter, PeakBytes() as memory:
        run()
    return (counter.get_total_flops() + fused.flops) / 1e12, memory.peak / 1e9


@dataclass(frozen=True)
class Model:
    """A pipeline.

    Attributes:
        name: to print.
        make: pixels a side -> the denoiser and one sample.
        make_vae: its VAE.
        latents: channels of a latent.
        text_encoders: parameters in billions, as published.
        size: pixels a side that it was trained for.
        guided: whether its pipeline asks twice a step.
        frames: whether its VAE takes videos, of one frame here.
    """

    name: str
    make: Callable[[int], tuple[nn.Module, Sample]]
    make_vae: Callable[[], nn.Module]
    latents: int
    text_encoders: tuple[float, ...]
    size: int = 1024
    guided: bool = False
    frames: bool = False

    @property
    def branches(self) -> int:
        """Predictions a step."""
        return 2 if self.guided else 1

    @property
    def text_weights(self) -> float:
        """Parameters of the text encoders."""
        return 1e9 * sum(self.text_encoders)


def sd15(size: int) -> tuple[nn.Module, Sample]:
    """The UNet of SD1.5 and one sample."""
    with torch.device("meta"):
        return UNet2DConditionModel(**SD15), {
            "sample": torch.empty(1, 4, size // 8, size // 8),
            "timestep": torch.ones(1),
            "encoder_hidden_states": torch.empty(1, 77, 768),
        }


def klein(size: int) -> tuple[nn.Module, Sample]:
    """The transformer of FLUX.2 klein 4B and one sample."""
    tokens = (size // 16) ** 2
    with torch.device("meta"):
        return Flux2Transformer2DModel(**KLEIN_4B), {
            "hidden_states": torch.empty(1, tokens, 128),
            "timestep": torch.ones(1),
            "encoder_hidden_states": torch.empty(1, 512, 7680),
            "img_ids": torch.empty(tokens, 4),
            "txt_ids": torch.empty(512, 4),
        }


def qwen(size: int) -> tuple[nn.Module, Sample]:
    """The transformer of Qwen-Image and one sample, with a prompt of 128 tokens."""
    side = size // 16
    with torch.device("meta"):
        return QwenImageTransformer2DModel(), {
            "hidden_states": torch.empty(1, side**2, 64),
            "timestep": torch.ones(1),
            "encoder_hidden_states": torch.empty(1, 128, 3584),
            "img_shapes": [[(1, side, side)]],
        }


def make_kl(**options: Any) -> Callable[[], nn.Module]:
    """A maker of the VAE that Stable Diffusion and FLUX.1 share but for its options."""
    return lambda: AutoencoderKL(**KL, **options)


CLIP_L, CLIP_G, T5_XXL, QWEN3_4B, QWEN25_VL = 0.123, 0.695, 4.76, 4.02, 8.29
PLAIN = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}

SD = Model("SD1.5", sd15, make_kl(), 4, (CLIP_L,), size=512, guided=True)
XL = Model("SDXL", sdxl, make_kl(), 4, (CLIP_L, CLIP_G), guided=True)
FLUX1 = Model("FLUX.1", flux, make_kl(**PLAIN), 16, (CLIP_L, T5_XXL))
KLEIN = Model("FLUX.2 klein 4B", klein, AutoencoderKLFlux2, 32, (QWEN3_4B,))
QWEN = Model("Qwen-Image", qwen, AutoencoderKLQwenImage, 16, (QWEN25_VL,), frames=True)
MODELS = (SD, XL, FLUX1, KLEIN, QWEN)
PAIRS = ((SD, XL), (XL, FLUX1), (FLUX1, KLEIN), (FLUX1, QWEN))


def choose_linear(denoiser: nn.Module) -> list[str]:
    """The modules that probing fits where source and target have no class of blocks in common."""
    return [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear)
        and find_block(name)
        and "norm" not in name
        and is_adaptable(name)
    ]


def name_block(module: str) -> str:
    """The block that a module is in."""
    position = find_block(module)
    assert position is not None
    return f"{position.stack}.{position.number}"


@dataclass(frozen=True)
class Denoiser:
    """Counts of a denoiser, of one sample.

    Attributes:
        weights: all of them.
        fitted: those that get an update.
        blocks: how many have updates.
        inside: all weights of these blocks.
        largest: all weights of the largest of them.
        factors: Σ d² over the sides of the fitted weights that get a full factor.
        tflop: of a prediction.
        peak: of a prediction without gradients, in GB.
        activations: for a backward pass, in GB.
        others: weights that get no update, in float32 for the backward pass, in GB.
        stream: what a block gives out, in GB.
    """

    weights: float
    fitted: float
    blocks: int
    inside: float
    largest: float
    factors: float
    tflop: float
    peak: float
    activations: float
    others: float
    stream: float


@cache
def count_denoiser(model: Model, size: int, attention: bool) -> Denoiser:
    """Counts of a denoiser with updates of its attention, or of all linear modules of blocks."""
    denoiser, sample = model.make(size)
    names = match_modules(denoiser, ATTENTION) if attention else choose_linear(denoiser)
    counts = count(denoiser, sample, names)
    blocks = [denoiser.get_submodule(name) for name in dict.fromkeys(map(name_block, names))]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    streams: list[int] = []

    def note_streams(_module: nn.Module, _args: object, output: object) -> None:
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        streams.append(sum(4 * t.numel() for t in tensors))

    for block in blocks:
        block.register_forward_hook(note_streams)
    _, peak = count_forward(lambda: denoiser(**sample, return_dict=False))
    return Denoiser(
        weights=counts["all weights"],
        fitted=counts["weights"],
        blocks=len(blocks),
        inside=sum(sizes),
        largest=max(sizes),
        factors=counts["factors"],
        tflop=counts["Tflop a prediction"],
        peak=peak,
        activations=counts["activations GB"],
        others=counts["other weights in float32 GB"],
        stream=max(streams) / 1e9,
    )


@dataclass(frozen=True)
class Autoencoder:
    """Counts of a VAE in float32 for one image: weights, Tflop, and peaks in GB."""

    weights: float
    decode: float
    encode: float
    decode_peak: float
    encode_peak: float


@cache
def count_vae(model: Model, size: int) -> Autoencoder:
    """Counts of a VAE."""
    frames = (1,) if model.frames else ()
    with torch.device("meta"):
        vae = model.make_vae().requires_grad_(False)
        image = torch.empty(1, 3, *frames, size, size)
        latent = torch.empty(1, model.latents, *frames, size // 8, size // 8)
    decode, decode_peak = count_forward(lambda: vae.decode(latent))
    encode, encode_peak = count_forward(lambda: vae.encode(image))
    weights = sum(p.numel() for p in vae.parameters())
    return Autoencoder(weights, decode, encode, decode_peak, encode_peak)


@dataclass(frozen=True)
class Passes:
    """How often models run on one sample.

    Attributes:
        ours: predictions of the source.
        theirs: predictions of the target.
        there: decodings by the source's VAE, each with an encoding by the target's.
        back: the other way round.
    """

    ours: int
    theirs: int
    there: int = 0
    back: int = 0

    def describe(self) -> str:
        """In one cell."""
        parts = [f"{self.ours} + {self.theirs}"] if self.ours else []
        parts += [f"{self.theirs}"] if self.theirs and not self.ours else []
        crossed = f"{self.there} + {self.back}" if self.back else f"{self.there}"
        return ", ".join(parts + ([f"{crossed} crossings"] if self.there else []))


@dataclass(frozen=True)
class Crossing:
    """A pair at one size.

    Attributes:
        source: the pipeline of the LoRA.
        target: the other one.
        small: whether both sample 512² pixels; else each its size, and images are resized.
        attention: whether the LoRA is on the attention alone, or on all linear modules of blocks.
    """

    source: Model
    target: Model
    small: bool = False
    attention: bool = True

    @property
    def name(self) -> str:
        """What is printed."""
        ours, theirs = self.sizes
        both = ours == theirs
        name = f"{self.source.name}{'' if both else f', {ours}²'} → {self.target.name}, {theirs}²"
        return name if self.attention else f"{name}, feed-forward too"

    @property
    def sizes(self) -> tuple[int, int]:
        """Pixels a side of both."""
        if self.small:
            return 512, 512
        return self.source.size, self.target.size

    @property
    def ours(self) -> Denoiser:
        """The source, with the LoRA in its weights."""
        return count_denoiser(self.source, self.sizes[0], self.attention)

    @property
    def theirs(self) -> Denoiser:
        """The target: of two UNets the LoRA's roles get updates, else all linear modules."""
        roles = self.target is XL and self.attention
        return count_denoiser(self.target, self.sizes[1], roles)

    @property
    def vaes(self) -> tuple[Autoencoder, Autoencoder]:
        """Of source and target."""
        return count_vae(self.source, self.sizes[0]), count_vae(self.target, self.sizes[1])

    def count_passes(self, images: int) -> dict[str, Passes]:
        """Stage -> its passes, with so many images of each origin.

        Args:
            images: of each origin, for the fit; as many again are held out.
        """
        ours, theirs = 2 * self.source.branches, self.target.branches
        sampled = 2 * images * STEPS
        settings = FitSettings().sized(4 * sampled)  # of three origins, and of pairs of images
        probes, judged, batch = settings.probes, settings.held_out, settings.batch
        assert probes and judged and batch
        half, steps = probes // 2, settings.steps
        renewals = sum(step < 2 or step % 4 == 0 for step in range(steps))
        again = steps + renewals  # every backward pass computes the blocks again
        fitting = 5 * steps + 2 * renewals + again
        return {
            "sampling": Passes(ours * sampled, theirs * sampled),
            "images": Passes(0, 0, 4 * images, 2 * images),
            "asking: answers": Passes(2 * half, half, 2 * half),
            "asking: pairs": Passes(0, 2 * half),
            "fit": Passes(0, fitting * batch),
            "judging": Passes(2 * judged, 6 * judged, 2 * judged),
        }

    def estimate_minutes(self, passes: Passes) -> float:
        """Minutes of so many passes at RATE."""
        ours, theirs = self.vaes
        tflop = passes.ours * self.ours.tflop + passes.theirs * self.theirs.tflop
        tflop += passes.there * (ours.decode + theirs.encode)
        tflop += passes.back * (theirs.decode + ours.encode)
        return tflop / RATE / 60

    @property
    def loaded(self) -> float:
        """GB of both pipelines as they are loaded: all but the denoisers is float32."""
        rest = sum(model.text_weights for model in (self.source, self.target))
        rest += sum(vae.weights for vae in self.vaes)
        return (2 * (self.ours.weights + self.theirs.weights) + 4 * rest) / 1e9

    def count_memory(self) -> dict[str, tuple[float, ...]]:
        """Stage -> GB with both pipelines on the card, and with what the stage uses alone."""
        ours, (our_vae, their_vae) = self.ours, self.vaes
        lora = 4 * ours.fitted / 1e9  # weights that get the LoRA are float32 meanwhile
        alone = 2 * ours.weights / 1e9 + lora
        vaes = 4 * (our_vae.weights + their_vae.weights) / 1e9
        image = max(v for vae in self.vaes for v in (vae.decode_peak, vae.encode_peak))
        sampling = self.source.branches * ours.peak
        answer = max(ours.peak, our_vae.decode_peak, their_vae.encode_peak)
        answer *= self.target.branches  # a call has as many samples as those of the target
        return {
            "loaded": (self.loaded,),
            "sampling with LoRA": (self.loaded + lora + sampling, alone + sampling),
            "images": (self.loaded + image, vaes + image),
            "answers": (self.loaded + lora + answer, alone + vaes + answer),
        }


def list_crossings() -> list[Crossing]:
    """All pairs at both sizes; two UNets also with updates of the feed-forward layers."""
    pairs = [(*PAIRS[0], True), (*PAIRS[0], False), *((*pair, True) for pair in PAIRS[1:])]
    return [
        Crossing(a, b, small, attention) for small in (False, True) for a, b, attention in pairs
    ]


def format_number(value: float) -> str:
    """Two digits, and all of an integer part."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def join_numbers(values: Iterable[float], sign: str = "/") -> str:
    """Several numbers in one cell."""
    return f" {sign} ".join(map(format_number, values))


def print_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table in Markdown."""
    columns = list(header)
    print(f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", sep="\n")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def list_models() -> Iterator[list[str]]:
    """Rows: what one prediction and one image cost, at 512² and 1024² pixels."""
    for model in MODELS:
        denoisers = [count_denoiser(model, size, attention=False) for size in (512, 1024)]
        vaes = [count_vae(model, size) for size in (512, 1024)]
        yield [
            model.name,
            format_number(denoisers[0].weights / 1e9),
            format_number(model.text_weights / 1e9),
            join_numbers(d.tflop for d in denoisers),
            join_numbers(vae.decode + vae.encode for vae in vaes),
            join_numbers(vae.decode_peak for vae in vaes),
            format_number(denoisers[0].fitted / 1e9),
            join_numbers(d.activations for d in denoisers),
        ]


def list_passes() -> Iterator[list[str]]:
    """Rows: what a stage runs, with few images and with more."""
    counts = [Crossing(SD, XL).count_passes(images) for images in IMAGES]
    for stage in counts[0]:
        yield [stage, *(passes[stage].describe() for passes in counts)]


def list_minutes() -> Iterator[list[str]]:
    """Rows: minutes by stage, and of more images."""
    for crossing in list_crossings():
        if not crossing.attention:
            continue  # as long as for the attention alone
        few, more = (crossing.count_passes(images) for images in IMAGES)
        minutes = {stage: crossing.estimate_minutes(passes) for stage, passes in few.items()}
        pairs = minutes.pop("asking: pairs")
        minutes["asking: answers"] += pairs
        numbers = [
            *minutes.values(),
            sum(minutes.values()),
            sum(map(crossing.estimate_minutes, more.values())),
        ]
        yield [crossing.name, *map(format_number, numbers)]


def list_memory() -> Iterator[list[str]]:
    """Rows: GB by stage before the fit."""
    for crossing in list_crossings():
        stages = crossing.count_memory().values()
        yield [crossing.name, *map(join_numbers, stages)]


def main() -> None:
    """Prints the tables."""
    example = Crossing(SD, XL)
    print_table(
        (
            "512² / 1024²",
            "weights, G",
            "text encoders, G",
            "Tflop, prediction",
            "Tflop, decode + encode",
            "GB, decode",
            "weights fitted, G",
            "GB, activations",
        ),
        list_models(),
    )
    print_table(("predictions", *(f"{images} images" for images in IMAGES)), list_passes())
    stages = ("sampling", "images", "asking", "fit", "judging", "sum")
    print_table(("minutes", *stages, f"sum, {IMAGES[1]} images"), list_minutes())
    print_table(("GB", *example.count_memory()), list_memory())


if __name__ == "__main__":
    main()
