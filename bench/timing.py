"""The memory of a process."""

from pathlib import Path


def peak_gib():
    """The most resident memory of this process so far, in GiB.

    VmHWM begins anew with every program; ru_maxrss of a child begins at its parent's size.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20
