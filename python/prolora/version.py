"""The version, in one place for metadata and reports."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("prolora")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"
