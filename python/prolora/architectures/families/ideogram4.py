"""Ideogram 4. Its second transformer, for the unconditional pass, has the same modules."""

from ..family import Family, fuse_qkv

FAMILY = Family(
    id="ideogram4",
    title="Ideogram 4",
    layouts=("ideogram4",),
    authors={
        "layers.N.attention.qkv": fuse_qkv("layers.N.attention.to_{}"),
        "layers.N.attention.o": "layers.N.attention.to_out.0",
    },
    # musubi-tuner writes "ideogram4" and "ideogram-4", ai-toolkit "ideogram4", OneTrainer
    # "ideogram".
    claims={"ideogram": "Ideogram 4"},
)
