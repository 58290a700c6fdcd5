"""The package can be imported a second time in one process, as autoreload of a notebook does."""

import subprocess
import sys

SECOND_IMPORT = """
import sys, torch, prolora
delta, source, target = (torch.randn(40, 24) for _ in range(3))
first = prolora.project(delta, source, target)
for name in [name for name in sys.modules if name.split(".")[0] == "prolora"]:
    del sys.modules[name]
import prolora
assert torch.equal(prolora.project(delta, source, target), first)
print("equal")
"""


def test_package_imported_twice_gives_equal_numbers():
    done = subprocess.run(
        [sys.executable, "-c", SECOND_IMPORT], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("equal\n", "")
