"""The flags `--data` and `--stages` of the jobs that train, plan and look at data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace

from llama_ray.data.mixtures.sources import DataSource, parse_sources
from llama_ray.data.mixtures.stages import Stage
from llama_ray.storage.paths import existing

SOURCES = dict[str, str | dict[str, str | float | None]] | list[str] | str | None
"""The type of `--data`; see `parse_sources`."""


def sources_of(given: Any) -> tuple[DataSource, ...]:
    """Return the sources that `--data` names, where they are in this process. Raises ValueError."""
    return tuple(
        dataclasses.replace(source, location=existing(source.location)) for source in parse_sources(given)
    )


def stages_of(given: Sequence[Namespace | Stage]) -> tuple[Stage, ...]:
    """Return the stages that `--stages` describes, which jsonargparse has parsed. Raises ValueError."""
    return tuple(Stage(**vars(stage)) for stage in given)
