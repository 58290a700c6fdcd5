"""Reads a folder of pictures and their captions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidOption, UnsupportedFormat, input_error
from ..files.untrusted import open_regular, read_text

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LEAST = 4
"""Least number of pictures of a training, which holds out a quarter."""
MOST_PIXELS = 50_000_000
"""Of one picture, by its header: a file of 20 kB can have 13,000 × 13,000 pixels."""
_SYSTEM = frozenset({"thumbs.db", "desktop.ini"})
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_OPAQUE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


class PictureFolder(NamedTuple):
    """The pictures of a folder.

    Attributes:
        captions: picture -> caption.
        left_out: names of the files and folders there that are neither pictures nor captions.
    """

    captions: dict[Path, str]
    left_out: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Says which files are not used, for example those of a subfolder."""
        if not self.left_out:
            return ()
        some, more = ", ".join(self.left_out[:3]), len(self.left_out) - 3
        rest = f" and {more} more" if more > 0 else ""
        kinds = ", ".join(SUFFIXES)
        return (f"Not used of the folder of pictures: {some}{rest} (pictures are {kinds} in it).",)


def read_pictures(folder: Path, prompts: tuple[str, ...]) -> PictureFolder:
    """Reads the pictures of a folder and the captions beside them, in any case (`A.PNG`, `a.TXT`).

    Files of the system (`._a.png` of macOS, `Thumbs.db`) do not count.

    Args:
        folder: with pictures and captions.
        prompts: if it is one, a picture without a caption has this.

    Raises:
        InvalidOption: too few pictures, one without a caption, or a caption without a picture.
        UnsupportedFormat: a picture that cannot be read, or is too large.
    """
    try:
        # Windows compares paths without case, text as every system does.
        every = sorted(folder.iterdir(), key=str) if folder.is_dir() else []
        files = [file for file in every if not _is_of_system(file)]
        folders = [file for file in files if file.is_dir()]
    except OSError as error:  # a folder without permission, a name that is too long, …
        raise input_error(folder, error) from error
    pictures = [file for file in files if file.suffix.lower() in SUFFIXES and file not in folders]
    texts: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix.lower() == ".txt" and file not in folders:
            texts.setdefault(file.stem.casefold(), []).append(file)
    if len(pictures) < LEAST:
        inside = f"; folders in it are not read ({folders[0].name})" if folders else ""
        raise InvalidOption(
            f"pictures: {folder} has {len(pictures)} ({', '.join(SUFFIXES)}), and a training needs "
            f"{LEAST} or more, of which it holds out a quarter{inside}"
        )
    named = {file.stem.casefold() for file in pictures}
    for stem, captions in texts.items():
        if stem not in named:
            raise InvalidOption(f"pictures: {captions[0]} is a caption without a picture")
        if len(captions) > 1:
            both = " and ".join(file.name for file in captions)
            raise InvalidOption(f"pictures: {both} are captions of one picture; remove one of them")
    found = {}
    for file in pictures:
        read_picture(file)
        found[file] = _read_caption(file, texts, prompts)
    used = {*found, *(text for one in texts.values() for text in one)}
    left_out = tuple(file.name + "/" * (file in folders) for file in files if file not in used)
    return PictureFolder(found, left_out)


def _is_of_system(file: Path) -> bool:
    return file.name.startswith(".") or file.name.lower() in _SYSTEM


def _read_caption(file: Path, texts: dict[str, list[Path]], prompts: tuple[str, ...]) -> str:
    if beside := texts.get(file.stem.casefold()):
        return " ".join(read_text(beside[0]).split())
    if len(prompts) == 1:
        return prompts[0]
    raise InvalidOption(
        f"pictures: {file.name} has no caption: write {file.with_suffix('.txt').name} beside it, "
        "or give one of `prompts`, which all pictures without a caption get"
    )


def read_picture(path: Path, height: int = 1, width: int = 1) -> Tensor:
    """Reads [1, 3, height, width] from −1 to 1, cut to the middle; refuses to enlarge.

    Grey of 16 bits becomes 8 bits. A transparent picture lies on white.

    Raises:
        InvalidOption: it is smaller than height × width.
        UnsupportedFormat: it cannot be read, has more than `MOST_PIXELS`, or 32 bits a value.
    """
    from PIL import Image, ImageOps

    with open_regular(path) as file:
        try:
            with Image.open(file) as opened:
                _check_size(path, opened.size)
                picture = _as_eight_bits(path, ImageOps.exif_transpose(opened))
        except UnsupportedFormat:
            raise
        except Exception as error:  # decoders raise any type
            raise UnsupportedFormat(
                f"{path}: cannot be read as a picture: {type(error).__name__}: {error}"
            ) from error
    if picture.width < width or picture.height < height:
        raise InvalidOption(
            f"pictures: {path} has {picture.width} × {picture.height} pixels, and {width} × "
            f"{height} are trained: give larger pictures, or a smaller `size`"
        )
    pixels = torch.from_numpy(np.array(ImageOps.fit(picture, (width, height))))
    return pixels.movedim(-1, 0)[None].float() / 127.5 - 1


def _check_size(path: Path, size: tuple[int, int]) -> None:
    if math.prod(size) > MOST_PIXELS:
        raise UnsupportedFormat(
            f"{path}: has {size[0]:,} × {size[1]:,} pixels, and more than "
            f"{MOST_PIXELS // 1_000_000} million are not read; make it smaller"
        )


def _as_eight_bits(path: Path, opened: Image.Image) -> Image.Image:
    """Returns a picture as RGB, on white where it is transparent."""
    from PIL import Image

    if opened.mode in _SIXTEEN_BITS:  # Pillow's own conversion makes all of it white
        values = np.asarray(opened)
        return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if opened.mode in _WITH_ALPHA or "transparency" in opened.info:
        picture = opened.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    if opened.mode in _OPAQUE:
        return opened.convert("RGB")
    raise UnsupportedFormat(
        f"{path}: its values have 32 bits (mode {opened.mode!r}), and nothing tells which of them "
        "is white; save it with 8 bits"
    )
