"""The lengths of documents and the sources of a dataset as a picture in a file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from llama_ray.data.dataset.files import DatasetFiles
from llama_ray.data.dataset.shards import DatasetError
from llama_ray.data.inspection.lengths import Lengths
from llama_ray.utils.errors import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png", ".pdf")


def check_suffix(path: Path) -> None:
    """Raise DatasetError for the name of a file that cannot be a picture."""
    if path.suffix.lower() not in SUFFIXES:
        raise DatasetError(f"output is {path}; it must end with {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")


def write_picture(files: DatasetFiles, path: Path) -> None:
    """Draw the lengths of the documents of both splits, and the tokens of each source. Raises OSError."""
    # Takes most of a second, which only those wait for who want a picture.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    lengths, sources = figure.subplots(1, 2, width_ratios=[2, 1])
    _draw_lengths(lengths, files)
    _draw_sources(sources, files)
    figure.suptitle(printable(files.location, 100))
    figure.savefig(path)


def _draw_lengths(axes: Axes, files: DatasetFiles) -> None:
    splits = [split for split in files.info.splits if files.info.documents(split)]
    for number, split in enumerate(splits):
        found = Lengths.of(files, split)
        bins = found.by_power()
        places = [low.bit_length() + number / len(splits) for low, _, _ in bins]
        heights = [100 * count / found.documents for _, _, count in bins]
        label = f"{split}: {found.documents:,} documents, median {found.quantile(0.5):,} tokens"
        axes.bar(places, heights, 0.9 / len(splits), align="edge", label=label)
    low, high = (int(limit) for limit in axes.get_xlim())
    ticks = range(max(low, 1), high + 1)
    axes.set_xticks(ticks, [f"{1 << tick - 1:,}" for tick in ticks], rotation=45, ha="right")
    axes.set(xlabel="tokens of a document, from", ylabel="% of documents")
    if splits:
        # Above the bars, wherever they are.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def _draw_sources(axes: Axes, files: DatasetFiles) -> None:
    tokens: Counter[str] = Counter()
    for shards in files.info.splits.values():
        for shard in shards:
            tokens[shard.source] += shard.tokens
    named = [(printable(name, 30), count / 1e6) for name, count in reversed(tokens.most_common(20))]
    axes.barh([name for name, _ in named], [count for _, count in named])
    axes.set(xlabel="million tokens")
