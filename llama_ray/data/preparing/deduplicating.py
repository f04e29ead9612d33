"""Which texts of a corpus repeat an earlier one: over the cluster, with a result that does not depend on its size."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_ray.data.cleaning.duplicates.groups import resolve
from llama_ray.data.cleaning.duplicates.pairs import KeyRange, find_pairs, plan
from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.output_directory import WORK
from llama_ray.data.preparing.part_task import Job, clean_part, duplicates_file, key_file
from llama_ray.data.preparing.parts import Part
from llama_ray.data.preparing.passes import run_pass
from llama_ray.data.preparing.progress import Log
from llama_ray.data.preparing.ray_tasks import run_tasks
from llama_ray.data.sources.files import SourceError


def find_duplicates(config: PrepareConfig, parts: Sequence[Part], job: Job, log: Log) -> None:
    """Write the cleaned texts of all parts, and which of them are duplicates, unless that is done.

    Of texts with an equal key the first one stays, in the order of the parts.
    """
    work = Path(job.directory) / WORK
    if duplicates_file(work).exists():
        return
    run_pass("cleaned", clean_part, config, parts, job, log)
    files = [str(key_file(work, part.index)) for part in parts]
    spans = plan([Path(file) for file in files])
    waiting = [span for span in spans if not _pairs_file(work, span).exists()]
    rows = [{"band": span.band, "index": span.index, "count": span.count} for span in waiting]
    for result in run_tasks(functools.partial(_find, key_files=files, work=str(work)), rows, config.workers):
        if result["error"]:
            raise SourceError(result["error"])
    found = resolve((_pairs_file(work, span) for span in spans), duplicates_file(work))
    log(f"{found:,} texts repeat an earlier one ({config.cleaning.dedup})")


def _find(row: dict[str, Any], key_files: Sequence[str], work: str) -> dict[str, Any]:
    span = KeyRange(**row)
    try:
        find_pairs([Path(file) for file in key_files], span, _pairs_file(Path(work), span))
    except OSError as error:
        return {"error": f"cannot write to {work} on a worker ({error}); free space or choose another output"}
    return {"error": ""}


def _pairs_file(work: Path, span: KeyRange) -> Path:
    return work / f"pairs-{span.band:02d}-{span.index:05d}-of-{span.count:05d}.npy"
