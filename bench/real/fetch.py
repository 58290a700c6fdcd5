"""Fetches what the studies run on, and checks it: ``python bench/real/fetch.py FOLDER``.

Two wheels of the PyPI package adaptive-terrain-diffusion (MIT), for the ONNX file in each, and the
training heightfields of its public repository (MIT). All are pinned by version or commit and by
SHA-256. FOLDER gets `0.4.1.onnx`, `0.4.2.onnx` and `maps.npy` (float32, 3000 × 128 × 128, in m);
what is there already is checked and kept.

With --published instead what published.py runs on, out of the wheels that PUBLISHED lists.

With --digits instead a ViT and a CNN that draw digits, their code and weights, of the public
repository MNIST-diffusion (MIT), for digits.py.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PACKAGE = "adaptive-terrain-diffusion"
MEMBER = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
WHEELS = {  # version -> SHA-256 of the wheel, and of the ONNX file in it
    "0.4.1": (
        "ae45819f1be906e6783999caf8f4d648f81007a86914f6a5d216d4fc6cb83328",
        "230f0ec1fae9c5e196aff0c887b7b2a7f57b9b240f8481dd5daa8c3333bb34ec",
    ),
    "0.4.2": (
        "dd803be2c98d764e4e64db18c631eef46c210282b398c4dd080f4cda3fa7c84d",
        "95be54b4a39d58320e187a7ec533351c957f16a00be58773c86074828ee67887",
    ),
}
REPOSITORY = "https://github.com/youwyu/Adaptive-Diffusion-Terrain"
COMMIT = "262488cd981f616898541198537a4b302fa2922a"
IN_REPOSITORY = "assets/elevation/train"
MAPS_DIGEST = "ea418c61ef1232a3473829508a0db1459e09ec90fb141d4d3fe300a2736dc2a1"
"""SHA-256 over name, null byte and SHA-256 of each file, sorted by name."""
MAPS, SIDE = 3000, 128


def fetch_model(folder: Path, version: str) -> None:
    """FOLDER/<version>.onnx, out of the wheel."""
    wheel_digest, model_digest = WHEELS[version]
    path = folder / f"{version}.onnx"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            wheel = download_wheel(f"{PACKAGE}=={version}", place)
            check_digest(wheel, hash_file(wheel), wheel_digest)
            with zipfile.ZipFile(wheel) as archive:
                Path(place, path.name).write_bytes(archive.read(MEMBER))
            Path(place, path.name).replace(path)
    check_digest(path, hash_file(path), model_digest)


def download_wheel(package: str, place: str) -> Path:
    command = ("pip", "download", "--no-deps", "--dest", place, package)
    subprocess.run([sys.executable, "-m", *command], check=True)
    (wheel,) = Path(place).glob("*.whl")
    return wheel


def fetch_maps(folder: Path, own: Path | None) -> None:
    """FOLDER/maps.npy, from a checkout of one's own or from the repository."""
    path = folder / "maps.npy"
    if path.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder) as place:
        texts = own or clone_maps(Path(place))
        digest, maps = hashlib.sha256(), []
        for file, content in read_sorted(texts):
            digest.update(file.encode() + b"\0" + hashlib.sha256(content).digest())
            numbers = content.replace(b"\n", b",").rstrip(b",").split(b",")
            maps.append(np.array(numbers, dtype=np.float32).reshape(SIDE, SIDE))
        check_digest(texts, digest.hexdigest(), MAPS_DIGEST)
        np.save(Path(place, path.name), np.stack(maps))
        Path(place, path.name).replace(path)


def clone_maps(place: Path) -> Path:
    """The folder of the heightfields, of the pinned commit and without the rest of it."""
    for command in (
        ("init", "--quiet"),
        ("remote", "add", "origin", REPOSITORY),
        ("fetch", "--depth", "1", "--filter=blob:none", "origin", COMMIT),
        ("sparse-checkout", "set", IN_REPOSITORY),
        ("checkout", "--quiet", COMMIT),
    ):
        subprocess.run(["git", "-C", str(place), *command], check=True)
    return place / IN_REPOSITORY


DIGITS = "https://github.com/sofia-dominguezc/MNIST-diffusion"
VIT = "88bc05803c987e40be4eacb48cf4bb14d7c58c5e"
CNN = "307028c6ce907ff442b2a4f1040029594700111b"
OF_DIGITS = {  # file -> (commit and path there, SHA-256)
    "vit_architecture.py": (
        f"{VIT}:diffusion/architecture.py",
        "d466d966aaa3bfa03799e70143e7a5918f100e52afe48dd2f97e228a6d00aacd",
    ),
    "vit.pth": (
        f"{VIT}:parameters/MNIST/DiffusionViT.pth",
        "2fd387f3a0c7bbd74cb209e4a7db43f18418a974e63b3d4b493fa2ab2f34f90c",
    ),
    "cnn_architecture.py": (
        f"{CNN}:src/architectures.py",
        "37e5c3b2665b63de067a8193af4b7c76c9dc1f93bc9e3e6e64ae9ee9e6c70470",
    ),
    "cnn.pth": (
        f"{CNN}:parameters/MNIST/Diffusion.pth",
        "7d9e7e8d1be1a05a98c2eaf6b5675a351e48a25f78482c39e592e2bd508dff13",
    ),
}


def fetch_digits(folder: Path) -> None:
    """The networks of digits.py, out of a clone without files."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        clone = ("clone", "--quiet", "--bare", "--filter=blob:none", DIGITS, place)
        subprocess.run(["git", *clone], check=True)
        for name, (stored, digest) in OF_DIGITS.items():
            if not (folder / name).exists():
                show = ["git", "-C", place, "show", stored]
                content = subprocess.run(show, check=True, capture_output=True).stdout
                (folder / name).write_bytes(content)
            check_digest(name, hash_file(folder / name), digest)


PUBLISHED = Path(__file__).with_name("published.sha256")
"""Packages with their licences, and the files of their wheels; read as `sha256sum` writes them."""


def fetch_published(folder: Path) -> None:
    """The weights of published.py, out of their wheels, which are not installed."""
    for block in PUBLISHED.read_text().split("# ")[1:]:
        package, *lines = block.strip().splitlines()
        wanted = {file: digest for digest, file in (line.split() for line in lines)}
        if not all((folder / file).exists() for file in wanted):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                wheel = download_wheel(package.split(",")[0], place)
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(folder, wanted)
        for file, digest in wanted.items():
            check_digest(file, hash_file(folder / file), digest)


def read_sorted(folder: Path) -> Iterator[tuple[str, bytes]]:
    files = sorted(folder.glob("*.txt"), key=lambda file: file.name)
    if len(files) != MAPS:
        raise SystemExit(f"{folder}: has {len(files)} heightfields, not {MAPS}")
    for file in files:
        yield file.name, file.read_bytes()


def hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_digest(what: object, found: str, wanted: str) -> None:
    if found != wanted:
        raise SystemExit(f"{what}: SHA-256 is {found}, not {wanted}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--maps", type=Path, help=f"{IN_REPOSITORY} of an own checkout")
    parser.add_argument("--digits", action="store_true", help="what digits.py runs on")
    parser.add_argument("--published", action="store_true", help="what published.py runs on")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.digits:
        fetch_digits(given.folder)
    elif given.published:
        fetch_published(given.folder)
    else:
        for one in WHEELS:
            fetch_model(given.folder, one)
        fetch_maps(given.folder, given.maps)
