"""The filters by their names."""

from __future__ import annotations

from typing import Final

from llama_ray.data.cleaning.filters.c4 import c4, fineweb_c4
from llama_ray.data.cleaning.filters.fineweb import fineweb
from llama_ray.data.cleaning.filters.gopher_quality import gopher_quality
from llama_ray.data.cleaning.filters.gopher_repetition import gopher_repetition
from llama_ray.data.cleaning.filters.reading import Filter

FILTERS: Final[dict[str, Filter]] = {
    "gopher_quality": gopher_quality,
    "gopher_repetition": gopher_repetition,
    "c4": c4,
    "fineweb_c4": fineweb_c4,
    "fineweb": fineweb,
}
