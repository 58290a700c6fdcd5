"""What a LoRA was trained to be called by, from its header: a trigger phrase, tags of captions.

Headers are anybody's: what is no table of texts and counts is passed over, and texts lose their
control characters and what is beyond LONGEST.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LONGEST = 300
"""Characters of a tag or phrase; text encoders read few hundred."""
_MOST = 2000  # tags of one folder: more are no help, and a header may hold millions
_LARGEST = 10**9  # of a count


@dataclass(frozen=True)
class CaptionedFolder:
    """A folder of training images."""

    images: int  # how many have captions, at least
    tags: Mapping[str, int]  # tag -> number of its images, most frequent first


@dataclass(frozen=True)
class TrainingWords:
    """What a LoRA's header says of its training's texts."""

    trigger: str = ""  # the phrase that the author names; empty without one
    # Images with captions, without folders for regularisation
    folders: tuple[CaptionedFolder, ...] = ()

    def list_tags(self, most: int) -> list[str]:
        """Lists the most frequent tags of all folders together."""
        counts: Counter[str] = Counter()
        for folder in self.folders:
            counts.update(folder.tags)
        return [tag for tag, _ in counts.most_common(most)]


def read_trigger_words(metadata: Mapping[str, str]) -> TrainingWords:
    """Reads the fields of kohya's trainers and of the Stability model spec.

    Tags by folder stand in `ss_tag_frequency`, or in every table of `ss_datasets` where several
    sets were configured. A folder of both counts once.
    """
    tables = [_read_json(metadata, "ss_tag_frequency")]
    sets = _read_json(metadata, "ss_datasets")
    for one in sets if isinstance(sets, list) else ():
        tables.append(one.get("tag_frequency") if isinstance(one, dict) else None)
    folders: dict[str, Any] = {}
    for table in tables:
        for name, counts in table.items() if isinstance(table, dict) else ():
            folders.setdefault(name, counts)
    images = _read_json(metadata, "ss_dataset_dirs")
    regular = _read_json(metadata, "ss_reg_dataset_dirs")
    read = []
    for name, counts in folders.items():
        if isinstance(regular, dict) and name in regular:
            continue
        tags = dict(_read_counts(counts))
        if tags:
            image_counts = images.get(name) if isinstance(images, dict) else None
            stated = image_counts.get("img_count") if isinstance(image_counts, dict) else None
            read.append(CaptionedFolder(max(_as_count(stated), *tags.values()), tags))
    trigger = clean_text(metadata.get("modelspec.trigger_phrase", ""))
    return TrainingWords(trigger, tuple(read))


def combine_tags(headers: Mapping[str, Mapping[str, str]]) -> str:
    """Combines `ss_tag_frequency` of several LoRAs; "" if none has it.

    `headers` is name of a LoRA -> its metadata. A folder that two of them have is kept for both.
    """
    folders: dict[str, dict[str, int]] = {}
    for name, metadata in headers.items():
        table = _read_json(metadata, "ss_tag_frequency")
        for folder, counts in table.items() if isinstance(table, dict) else ():
            tags = dict(_read_counts(counts))
            if tags:
                folders[f"{folder} ({name})" if folder in folders else folder] = tags
    return json.dumps(folders, ensure_ascii=False) if folders else ""


def clean_text(text: str) -> str:
    """Reduces text to one printable line of at most LONGEST characters."""
    printable = (
        " " if kind in ("Cc", "Zl", "Zp") else character
        for character in text[: 4 * LONGEST]
        if (kind := unicodedata.category(character)) == "Cc" or kind[0] != "C"
    )
    return " ".join("".join(printable).split())[:LONGEST].rstrip()


def _read_json(metadata: Mapping[str, str], field: str) -> Any:
    try:
        return json.loads(metadata.get(field, "null"))
    except (ValueError, RecursionError):
        return None


def _read_counts(counts: Any) -> Iterator[tuple[str, int]]:
    """Tags and positive counts of what should be such a table, most frequent first."""
    if not isinstance(counts, dict):
        return
    positive: Counter[str] = Counter()
    for tag, count in counts.items():
        cleaned = clean_text(tag)
        if cleaned and _as_count(count):
            positive[cleaned] = min(positive[cleaned] + _as_count(count), _LARGEST)
    yield from positive.most_common(_MOST)


def _as_count(value: Any) -> int:
    """Returns a count up to _LARGEST; 0 for anything else."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return min(value, _LARGEST) if whole and value > 0 else 0
