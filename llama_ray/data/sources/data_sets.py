"""What the library `datasets` keeps beside the records: notes, caches, and splits that are not for training."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

TRAIN = "train"
SPLITS_FILE = "dataset_dict.json"

_NOTES = ("dataset_info.json", "dataset_infos.json", "state.json", SPLITS_FILE, "cache-*.arrow")
# https://huggingface.co/docs/datasets/repository_structure
_SPLIT = re.compile(
    r"(?:^|[^a-z])(?:(train|training)|test|testing|eval|evaluation|val|valid|validation|dev)(?:[^a-z]|$)"
)


def is_note(name: str) -> bool:
    """Whether a file of this name is one that `datasets` writes beside the records."""
    return any(fnmatchcase(PurePosixPath(name).name, pattern) for pattern in _NOTES)


def other_splits(names: Sequence[str], read: Callable[[str], bytes]) -> set[str]:
    """Return which of the files are of another split than `train`, in folders that a `DatasetDict` was saved to.

    `read` returns the content of one of the files. A `DatasetDict` without `train` is taken as a whole.
    """
    others = set()
    for name in names:
        path = PurePosixPath(name)
        if path.name == SPLITS_FILE:
            folders = [path.parent / split for split in _other_splits(read(name))]
            others |= {other for other in names if any(map(PurePosixPath(other).is_relative_to, folders))}
    return others


def splits_by_name(names: Sequence[str]) -> set[str]:
    """Return which of the files are of another split than `train` as their names tell, if there is one of `train`."""
    found = {name: match for name in names if (match := _SPLIT.search(name.lower()))}
    if not any(match[1] for match in found.values()):
        return set()
    return {name for name, match in found.items() if not match[1]}


def _other_splits(content: bytes) -> list[str]:
    try:
        splits = json.loads(content)["splits"]
    except (ValueError, KeyError, TypeError):
        return []
    if not isinstance(splits, list) or TRAIN not in splits:
        return []
    return [split for split in splits if isinstance(split, str) and split != TRAIN]
