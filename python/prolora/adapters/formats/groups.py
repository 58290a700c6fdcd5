"""Where each update of an adapter goes in a file, and which of them share a pair of factors."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...architectures import flux
from ...architectures.modules import find_component, local_name
from ...core.lowrank import LowRank
from ...errors import UnsupportedFormat
from .. import fused_updates, vectors
from ..adapter import Adapter
from ..family import SDXL_FAMILY, guess_family
from ..keys import module_names


@dataclass(frozen=True)
class Group:
    """The modules that share one pair of factors in a file: several in FLUX's fused weights only.

    Put together one at a time: a fused `up` is block-diagonal and mostly zeros.

    Attributes:
        path: the module's name in the keys of the file.
        parts: module -> its update.
        matrix: the original weight of FLUX that they are rows of, if it is one.
    """

    path: str
    parts: dict[str, LowRank]
    matrix: flux.FluxWeight | None

    @property
    def modules(self) -> list[str]:
        """The names of the parts."""
        return list(self.parts)

    @property
    def rank(self) -> int:
        """Columns of the factors in the file."""
        return (
            fused_updates.fused_rank(self.matrix, self.parts) if self.matrix else self._first.rank
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the factors in the file."""
        m, n = self._first.shape
        return (fused_updates.fused_height(self.matrix, self.parts) if self.matrix else m), n

    def update(self) -> LowRank:
        """The factors in the file."""
        return fused_updates.fuse_updates(self.matrix, self.parts) if self.matrix else self._first

    def split(self, update: LowRank) -> dict[str, LowRank]:
        """Module -> its part of other factors of the same shape."""
        if self.matrix:
            return fused_updates.unfuse_update(self.matrix, update, self.parts)
        return {self.modules[0]: update}

    @property
    def _first(self) -> LowRank:
        return self.parts[self.modules[0]]


def group_modules(adapter: Adapter, format: str) -> list[Group]:
    """What a file of that format consists of."""
    members: dict[str, list[str]] = {}
    for name, path in file_paths(adapter, format).items():
        members.setdefault(path, []).append(name)
    fused = is_fused(adapter, format)
    return [
        Group(
            path,
            {name: adapter.updates[name] for name in modules},
            flux.find_weight_holding(modules[0]) if fused else None,
        )
        for path, modules in members.items()
    ]


def respell_adapter(adapter: Adapter, format: str) -> Adapter:
    """The adapter in the spelling that a format asked for by name has.

    "kohya" means kohya's own names: a FLUX LoRA of OneTrainer, whose kohya format has diffusers'
    names, keeps those for "auto" only. kohya's scripts know none of them.

    Args:
        adapter: what to write.
        format: as it was asked for: "auto" or a format.
    """
    from_onetrainer = adapter.format == "kohya" and adapter.spelling == "diffusers"
    if format != "kohya" or not from_onetrainer:
        return adapter
    has_transformer = any(find_component(name) == "transformer" for name in adapter.updates)
    return replace(adapter, spelling="sgm") if has_transformer and _is_flux(adapter) else adapter


def is_fused(adapter: Adapter, format: str) -> bool:
    """Whether FLUX's weights are those of the original checkpoint in a file of that format."""
    if format == "comfy":
        return _is_flux(adapter)
    return format == "kohya" and _kohya_spelling(adapter) == "sgm"


def file_paths(adapter: Adapter, format: str) -> dict[str, str]:
    """Canonical name -> module path in the keys of `format`; parts of a fused weight share one.

    Raises:
        UnsupportedFormat: the format has no name for a module.
    """
    paths = find_paths(adapter, format, list(adapter.updates))
    if format == "peft":
        _check_one_component(list(adapter.updates))
    return paths


def find_paths(adapter: Adapter, format: str, modules: list[str]) -> dict[str, str]:
    """The paths of some modules of an adapter, also of those it only has vectors of."""
    spelling = _kohya_spelling(adapter)
    # kohya numbers text encoders where a model has several: in the SDXL family and in FLUX.
    sdxl = spelling == "sgm" or _has_several_text_encoders(adapter)
    clip = "clip_h" if _text_width(adapter) == 1024 else "clip_l"
    paths: dict[str, str] = {}
    path: str | None
    siblings = [*adapter.updates, *modules]
    original = _is_flux(adapter)
    for name in modules:
        if format == "comfy" and find_component(name) == "transformer" and not original:
            path = _to_comfy_transformer(name, adapter)
        elif format == "kohya":
            path = module_names.to_kohya(name, spelling=spelling, siblings=siblings, sdxl=sdxl)
        elif format == "comfy":
            path = module_names.to_comfy(name, siblings=siblings, clip=clip)
        elif format == "diffusers":
            path = module_names.to_diffusers(name)
        else:
            path = "base_model.model." + local_name(name)
        if path is None:
            raise UnsupportedFormat(
                f"{name} has no name in the {format} format; write it with --format diffusers"
            )
        paths[name] = path
    return paths


def _check_one_component(modules: list[str]) -> None:
    """Refuses several components: a PEFT folder belongs to one model, and does not say to which."""
    places = {find_component(name) for name in modules}
    if len(places) > 1 or places & {"text_encoder_2", "text_encoder_3"}:
        raise UnsupportedFormat(
            f"a PEFT folder holds one model, but this adapter has modules of "
            f"{', '.join(sorted(places))}; write it with --format diffusers or kohya"
        )


def _kohya_spelling(adapter: Adapter) -> str:
    """The adapter's spelling, with three exceptions.

    UNets of four blocks (SD1.x, SD2.x) get diffusers' names: kohya itself trains those under them,
    and diffusers crashes on their two-digit SGM blocks. The SDXL family gets the names of the
    original checkpoint, as kohya writes them: A1111 finds no embedding and no upsampler under
    diffusers' names, and says nothing. FLUX gets the names of its authors, which are kohya's,
    unless the file came from OneTrainer, which has a kohya format with diffusers'.
    """
    modules = [*adapter.updates, *map(vectors.find_vector_module, adapter.vectors)]
    if any(n.startswith(("down_blocks.3.", "up_blocks.3.")) for n in modules):
        return "diffusers"
    if any(find_component(name) == "transformer" for name in modules):
        from_onetrainer = adapter.format == "kohya" and adapter.spelling == "diffusers"
        return "diffusers" if from_onetrainer or not _is_flux(adapter) else "sgm"
    return "sgm" if _guess_family(adapter) in SDXL_FAMILY else adapter.spelling


def _is_flux(adapter: Adapter) -> bool:
    """Whether the original names of FLUX are those of this model; SD3 shares diffusers' names."""
    is_flux = adapter.spelling == "sgm" or _guess_family(adapter) == "flux"
    transformer = (name for name in adapter.updates if find_component(name) == "transformer")
    return is_flux and all(flux.find_weight_holding(name) for name in transformer)


def _to_comfy_transformer(name: str, adapter: Adapter) -> str | None:
    """The path of a module of a transformer other than FLUX, or None if it is not known.

    Most of them (Qwen-Image, LTX) are in ComfyUI under diffusers' names; SD3 and PixArt are there
    under those of their authors, which are not written.
    """
    if _guess_family(adapter) in ("sd3", "pixart"):
        return None
    path = f"diffusion_model.{name}"
    return path if module_names.parse_path(path) else None


def _guess_family(adapter: Adapter) -> str | None:
    return guess_family({name: update.shape[1] for name, update in adapter.updates.items()}, {})


def _has_several_text_encoders(adapter: Adapter) -> bool:
    """Whether the model is of the SDXL or FLUX family, whose text encoders kohya numbers."""
    return any(
        find_component(name) in ("text_encoder_2", "text_encoder_3", "transformer")
        or (name.endswith(("attn2.to_k", "attn2.to_v")) and update.down.shape[-1] == 2048)
        for name, update in adapter.updates.items()
    )


def _text_width(adapter: Adapter) -> int | None:
    """The width of the first text encoder."""
    return next(
        (
            update.down.shape[-1]
            for name, update in adapter.updates.items()
            if name.startswith("text_encoder.") and name.endswith((".q_proj", ".k_proj", ".v_proj"))
        ),
        None,
    )
