"""scikit-build-core, for a Python that ignores PYTHONPATH too: as prolora's own, which says why."""

import importlib.util
import os
import runpy
import sys

if importlib.util.find_spec("scikit_build_core") is None:
    _before = sys.path
    for _folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if os.path.isfile(_site := os.path.join(_folder, "sitecustomize.py")):
            runpy.run_path(_site)
    sys.path = list(dict.fromkeys(sys.path + _before))

from scikit_build_core.build import *  # noqa: F403
