"""Diffusers pipeline folders as the models, samplers and translations that probing needs."""

from .crossing import CrossingSide, observe_sides, takes_few_steps
from .crossing_recorder import CrossingRecorder
from .pairing import PipelinePair, pair_pipelines
from .pipeline import Pipeline, describe_pipeline, run_text_encoders_beside
from .pipeline_opening import open_pipeline
from .stages import estimate_bytes
from .vram import CardPlan, plan_card

__all__ = [
    "CardPlan",
    "CrossingRecorder",
    "CrossingSide",
    "Pipeline",
    "PipelinePair",
    "describe_pipeline",
    "estimate_bytes",
    "observe_sides",
    "open_pipeline",
    "pair_pipelines",
    "plan_card",
    "run_text_encoders_beside",
    "takes_few_steps",
]
