"""Packs the package for the Python of a browser: ``python docs/pack_doctor.py FOLDER``.

FOLDER is then the page *What is this LoRA?*, for any server of files: docs/doctor/*, that zip, and
the npm package `pyodide`, which npm fetches unless it is there.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prolora.zip").write_bytes(pack_package())
    for file in (ROOT / "docs" / "doctor").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if not (folder / "pyodide").exists():
        npm = shutil.which("npm") or sys.exit("npm, which fetches Python for browsers, is missing")
        subprocess.run([npm, "pack", "--silent", "pyodide"], cwd=folder, check=True)
        (archive_file,) = folder.glob("pyodide-*.tgz")
        with tarfile.open(archive_file) as archive_of_npm:
            archive_of_npm.extractall(folder, filter="data")
        archive_file.unlink()
        (folder / "package").rename(folder / "pyodide")
