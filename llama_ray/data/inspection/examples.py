"""Some examples of data for tuning, with what is learned of them marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llama_ray.data.dataset.locations import open_files
from llama_ray.data.inspection.terminal import Style
from llama_ray.data.inspection.text import samples
from llama_ray.data.mixtures.sources import DataSource
from llama_ray.data.tokenizing.tokenizer import Tokenizer

_OF_EACH_SOURCE, _SHOWN_TOKENS = 2, 400
LEGEND = "⟦ ⟧ marks what the loss mask leaves out"


def examples(sources: Sequence[DataSource], seed: int, style: Style) -> Iterator[str]:
    """Yield lines that show examples of each source's training split."""
    yield style.title("examples of the data; " + ("what is not learned is dim" if style.colours else LEGEND))
    for source in sources:
        files = open_files(source.location)
        tokenizer = Tokenizer.load(files.tokenizer_directory())
        yield from samples(
            files, tokenizer, style, split="train", number=_OF_EACH_SOURCE, seed=seed, limit=_SHOWN_TOKENS
        )
