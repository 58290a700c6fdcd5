"""Draws the icons' sheet from the sets on npm: ``python bench/quality/icons/sheet.py``.

The sheet is in the repository; this shows where it comes from, and makes it again. It needs npm and
resvg-py 0.5.0. One row an icon, one column a set, in the order of the catalogue.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from catalogue import ICONS, MASTER, SETS, IconSet
from PIL import Image

SHEET = Path(__file__).parent / "sheet.png"
DRAWN = 128  # pixels at which the vectors are drawn before they are averaged down


def unpack_icons(icons: IconSet, folder: Path) -> dict[str, Any]:
    """The set's icons.json, from an archive that is the one expected.

    Raises:
        ValueError: the archive has another hash.
    """
    command = ["npm", "pack", icons.package, "--silent", "--pack-destination", str(folder)]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    packed = (folder / name).read_bytes()
    if hashlib.sha256(packed).hexdigest() != icons.sha256:
        raise ValueError(f"{icons.package}: the archive is not the one that was reviewed")
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        return json.loads(archive.extractfile("package/icons.json").read())


def draw_icon(icons: dict[str, Any], name: str) -> Image.Image:
    """One icon as MASTER × MASTER RGBA."""
    import resvg_py

    alias = icons.get("aliases", {}).get(name)
    icon = icons["icons"][alias["parent"] if alias else name]
    if alias and len(alias) > 1:
        raise ValueError(f"{name} is a turned copy of {alias['parent']}")
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'color="black" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN, height=DRAWN, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((MASTER, MASTER), Image.BOX)


def main() -> None:
    sheet = Image.new("RGBA", (MASTER * len(SETS), MASTER * len(ICONS)))
    with tempfile.TemporaryDirectory() as folder:
        for column, icons in enumerate(SETS.values()):
            known = unpack_icons(icons, Path(folder))
            for row, (_, name) in enumerate(ICONS):
                sheet.paste(draw_icon(known, name), (MASTER * column, MASTER * row))
    sheet.save(SHEET, optimize=True)


if __name__ == "__main__":
    main()
