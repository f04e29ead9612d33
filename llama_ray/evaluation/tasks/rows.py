"""The documents of the bundled tasks, as lm_eval's task files load them: `custom_dataset: !function rows.load`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_EXAMPLES = 5
"""The first documents of a file are examples for few-shot prompts and never asked."""


def load(file: str, **_: Any) -> dict[str, Any]:
    """Return the splits `examples` and `test` of a bundled file; lm_eval passes the task's metadata, too."""
    from datasets import Dataset

    lines = (Path(__file__).parent / "data" / f"{file}.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {
        "examples": Dataset.from_list(rows[:_EXAMPLES]),
        "test": Dataset.from_list(rows[_EXAMPLES:]),
    }
