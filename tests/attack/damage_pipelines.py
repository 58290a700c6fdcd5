"""A pipeline's configurations, what a fit kept, and a fit resumed after a change."""

import json
import shutil
from pathlib import Path

from damages import REFUSALS, Damage
from inputs import fit, list_cache, write_fitted, write_pipelines
from sandbox import Box, Row, Run
from truths import read_results


def list_configurations(box: Box) -> list[Path]:
    """All by which a pipeline says what it is."""
    folder = box.inputs / "source"
    named = [folder / "model_index.json", *sorted(folder.glob("*/*config.json"))]
    return [path for path in named if path.parent.name != "vocabulary"]


CHANGES = (
    ("unet/config.json", "norm_eps", 0.5),
    ("unet/config.json", "attention_head_dim", 4),
    ("unet/config.json", "norm_num_groups", 2),
    ("unet/config.json", "act_fn", "gelu"),
    ("unet/config.json", "flip_sin_to_cos", False),
    ("unet/config.json", "freq_shift", 1),
    ("unet/config.json", "mid_block_scale_factor", 2.0),
    ("unet/config.json", "resnet_time_scale_shift", "scale_shift"),
    ("scheduler/scheduler_config.json", "beta_end", 0.02),
    ("scheduler/scheduler_config.json", "beta_schedule", "linear"),
    ("text_encoder/config.json", "layer_norm_eps", 0.5),
    ("text_encoder/config.json", "hidden_act", "gelu"),
    ("text_encoder/config.json", "num_attention_heads", 4),
    ("tokenizer/tokenizer_config.json", "model_max_length", 6),
)
"""What a pipeline's answers depend on beside its weights."""


def resume(box: Box, row: Row) -> None:
    """The result is that of a fit that resumes nothing, or the change is refused."""
    template, kept, aside = box.fill(write_fitted), box.cache / "kept", box.cache / "aside"
    for name, key, value in row.random("resumed").sample(CHANGES, min(14, row.count(14))):
        box.begin(template)
        path = box.inputs / "source" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        kept.rename(aside)
        box.run(*fit(box), seconds=60)
        truth = read_results(box.out)
        shutil.rmtree(box.out)
        box.out.mkdir()
        shutil.rmtree(kept, ignore_errors=True)
        aside.rename(kept)

        def judge(run: Run, truth=truth) -> list[str]:
            if run.code:
                return ["refused" if run.code in REFUSALS else f"exit code {run.code}"]
            return ["equal" if read_results(box.out) == truth else "silent"]

        box.attack(row, fit(box), f"{name}: {key} is {value!r}", judge, seconds=60)


CASES = {
    "pipeline's configurations": Damage(write_pipelines, fit, list_configurations, 12),
    "state of a fit": Damage(write_fitted, fit, list_cache, 12, "cut flip stamp"),
    "fit resumed after a change": resume,
}
