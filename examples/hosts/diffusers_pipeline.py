"""diffusers at run time: the LoRA of another base in a pipeline that is loaded already."""

import prolora


def load(pipe, lora, source):
    moved = prolora.transfer(lora, source, pipe)
    pipe.load_lora_weights(moved.state_dict("diffusers"))
    return str(moved.report)
