"""Kandinsky 5: video Lite and Pro, image Lite. The authors use diffusers' names."""

from ..family import Family

FAMILY = Family(
    id="kandinsky5",
    title="Kandinsky 5",
    layouts=(
        "kandinsky5-lite",
        "kandinsky5-pro",
        "kandinsky5-image-lite",
        "kandinsky5-image-lite-edit",
    ),
    claims={
        # musubi-tuner writes both.
        "kandinsky5": "Kandinsky 5",
        "kandinsky-5": "Kandinsky 5",
    },
)
