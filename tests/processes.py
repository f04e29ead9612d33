"""Fresh processes that need no second for their imports."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext


def fresh_processes() -> ForkServerContext:
    """Return a context whose processes start from one that has imported what tests use, and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    # What starts first decides for all tests of this process.
    context.set_forkserver_preload(
        ["pytest", "transformers", "llama_ray.training.loop", "llama_ray.generation.engine"]
    )
    return context
