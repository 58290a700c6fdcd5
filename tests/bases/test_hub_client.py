"""The real client of the hub, against a server on this machine that answers as the hub does."""

from pathlib import Path

import pytest
from checkpoints import sparse_file, sparse_shards
from hubs import ask_client

pytest.importorskip("huggingface_hub")

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KEYS = {f"{Q}.weight": (4, 4), "conv_in.weight": (4, 4, 3, 3), "conv_out.weight": (4, 4, 3, 3)}


def opened(ids, address, home, offline=False):
    """What the real client gives of each base, or the error."""
    program = """
import prolora
for id_ in ids:
    try:
        base = prolora.open_base(id_)
    except prolora.errors.UnsupportedFormat as error:
        print("refused:", " ".join(str(error).split()))
    else:
        print(base.name, len(base.shapes), base.read(list(base.shapes)[0]).shape)
"""
    return ask_client(program, ids, address, home, offline)


@pytest.mark.slow
def test_the_client_fetches_the_shards_of_the_model_and_nothing_else(hub_server, tmp_path):
    address, repo, fetched = hub_server
    sparse_shards(repo / "unet", KEYS, 2)
    sparse_file(repo / "unet" / "diffusion_pytorch_model.fp16.safetensors", KEYS)
    sparse_file(repo / "text_encoder" / "model.safetensors", KEYS)
    home = tmp_path / "home"
    first, revision, other = opened(["org/m", "org/m@v2", "org/other"], address, home)
    assert first.startswith("org/m 3 ") and revision.startswith("org/m 3 ")
    assert other.startswith("refused: org/other: no such file or folder")
    assert "AttributeError" not in other
    stem = "unet/diffusion_pytorch_model"
    shards = {f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)}
    wanted = sorted({f"{stem}.safetensors.index.json", *shards})
    assert sorted(fetched) == wanted  # v2 is the same commit, and its files are there
    *again, never = opened(["hf://org/m", "org/m@v2", "org/never"], address, home, offline=True)
    assert all(said.startswith("org/m 3 ") for said in again)
    assert never.startswith("refused: org/never: no such file or folder"), never
    assert "HF_HUB_OFFLINE" in never and "AttributeError" not in never
    assert sorted(fetched) == wanted and not Path(home / "org").exists()
