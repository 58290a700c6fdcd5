"""How a call is timed, and the memory of a process measured."""

import time
from pathlib import Path

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


def peak_gib():
    """The most resident memory of this process so far, in GiB.

    VmHWM begins anew with every program; ru_maxrss of a child begins at its parent's size.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20
