"""HiDream-I1 (Full, Dev, Fast) and HiDream-E1: the feed-forward is a mixture of four experts.

ComfyUI and the trainers call the modules what diffusers calls them.
"""

from ..family import Family

FAMILY = Family(
    id="hidream",
    title="HiDream",
    layouts=("hidream-i1",),
    claims={
        "hidream_i1": "HiDream-I1",  # ai-toolkit
        "hidream-i1": "HiDream-I1",  # OneTrainer
    },
)
