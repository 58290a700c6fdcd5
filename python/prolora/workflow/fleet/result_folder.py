"""What a migration writes into its folder, and how that folder is told from others."""

from __future__ import annotations

import os

from ...files.managed_folder import FolderMarker, ManagedFolder

RESULTS, JOURNALS, PLANS = "loras", "journal", "plans"
"""The folders: a folder of results for each target; a file for each process that worked; a copy of
each plan that was run."""

FAILED, SUMMARY_JSON, SUMMARY_PAGE = "failed.jsonl", "summary.json", "summary.html"
"""The files: a line for each LoRA that failed; what became of all."""

MARKER = FolderMarker(
    "MIGRATION.TAG",
    b"# This folder was made by prolora migrate, which replaces and removes its own files in it.\n",
)


def make_result_folder(out: str | os.PathLike[str]) -> ManagedFolder:
    """The folder of a migration; one that is there may hold nothing that would be replaced.

    Raises:
        OutputError: it cannot be made, or holds a file or folder of such a name and is no
            migration's.
    """
    names = (RESULTS, JOURNALS, PLANS, FAILED, SUMMARY_JSON, SUMMARY_PAGE)
    return ManagedFolder.make(out, MARKER, names)
