"""How a run of MLflow ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llama_ray.tracking.runs import Run


@contextmanager
def ended(run: Run) -> Iterator[Run]:
    """Yield `run`, and mark it FINISHED after the block, or FAILED if that raises."""
    try:
        yield run
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish("FINISHED")
