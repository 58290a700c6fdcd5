"""SDXL to SSD-1B with real names, at an eighth of the width; bench/ runs the same at full size."""

import logging

import lora_files
import pytest
import sdxl
import torch
from published_unets import UNETS

import prolora

SCALE = 8


@pytest.mark.slow
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_attaches_all_272_modules_without_a_warning(tmp_path, caplog, format):
    from diffusers import UNet2DConditionModel

    done = prolora.transfer(*sdxl.write_all(tmp_path, SCALE), method="prolora")
    assert len(done.adapter.updates) == 272
    done.save(tmp_path / "out.safetensors", format=format, dtype=torch.float32)
    sizes = {"block_out_channels": [40, 80, 160], "cross_attention_dim": 2048 // SCALE}
    sizes |= {"addition_embed_type": None, "norm_num_groups": 8}
    unet = UNet2DConditionModel(**UNETS["ssd-1b"].config | sizes)
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft", "py.warnings")]
    logging.captureWarnings(True)
    for logger in loggers:
        logger.addHandler(caplog.handler)
    caplog.clear()
    try:
        attached = lora_files.through_diffusers(tmp_path / "out.safetensors", unet)
    finally:
        logging.captureWarnings(False)
        for logger in loggers:
            logger.removeHandler(caplog.handler)
    assert not [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    lora_files.same_updates(done.adapter, attached)
