"""How a call is timed."""

import time

import torch


def seconds(job, args):
    """Wall seconds of job(*args), until a GPU has finished too."""
    if args[0].is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    job(*args)
    if args[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
