"""Diffusers pipeline folders as the models, samplers and translations that probing needs."""

from .opening import open_pipeline
from .pairing import PipelinePair, pair_pipelines
from .pipeline import Pipeline

__all__ = ["Pipeline", "PipelinePair", "open_pipeline", "pair_pipelines"]
