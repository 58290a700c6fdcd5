"""Packs the package for the Python of a browser: ``python docs/pack_doctor.py FOLDER``.

With docs/doctor/*, that zip and the unpacked npm package `pyodide` as `pyodide/`, FOLDER is the
page *What is this LoRA?*, for any server of files.
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def pack_package() -> bytes:
    """Packs the modules and tables as they stand; the same bytes every time."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted((ROOT / "python").rglob("*")):
            if file.suffix in (".py", ".json"):
                name = file.relative_to(ROOT / "python").as_posix()
                archive.writestr(zipfile.ZipInfo(name), file.read_bytes(), zipfile.ZIP_DEFLATED)
    return packed.getvalue()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "prolora.zip").write_bytes(pack_package())
    for file in (ROOT / "docs" / "doctor").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
