"""How a call is timed, and the memory of a process measured."""

import time
from pathlib import Path

import torch


def seconds(job, args):
    """Seconds of job(*args): of wall time, until a GPU has finished too.

    On one thread of a CPU it is the time of the processor, which other load does not lengthen.
    """
    on_gpu = args[0].is_cuda
    alone = not on_gpu and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    job(*args)
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def peak_gib():
    """The most resident memory of this process so far, in GiB.

    VmHWM begins anew with every program; ru_maxrss of a child begins at its parent's size.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20
