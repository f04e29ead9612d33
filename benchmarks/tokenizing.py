"""MB of text a second and core that documents are encoded at: by `tokenizers`, by DocumentEncoder, and what bounds it.

    python benchmarks/tokenizing.py                                                    # 4 minutes
    python benchmarks/tokenizing.py --source DIR --tokenizer tokenizer.model --rounds 3

One thread. In a round each contestant encodes the same documents once, in turn; those whose library keeps what it has
seen begin without it, as a worker does. Figures are medians, ratios medians of the ratios within a round.
"""

from __future__ import annotations

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import statistics
import time
from collections.abc import Callable, Iterator

import tokenizers
from jsonargparse import auto_cli

from llama_ray.data.records.fields import TextFields
from llama_ray.data.records.pieces import read, split_file
from llama_ray.data.sources.find import files
from llama_ray.data.tokenizing.encoder import DocumentEncoder, choose_encoder
from llama_ray.data.tokenizing.fast import FastBackend
from llama_ray.data.tokenizing.tokenizer import Tokenizer

BATCH = 64
"""Documents that are encoded at once."""


def texts_of(source: str, size: float) -> list[str]:
    """Return the first texts of a source, of `size` MB."""
    found: list[str] = []
    for file in sorted(files(source, lambda left_out: None)):
        for piece in split_file(file, TextFields()):
            for text, _ in read(piece, TextFields(), lambda left_out: None):
                found.append(text)
                size -= len(text.encode()) / 1e6
                if size <= 0:
                    return found
    return found


def batches(texts: list[str]) -> Iterator[list[str]]:
    """Yield the texts, some at a time."""
    yield from (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))


def seconds(work: Callable[[], object]) -> float:
    """Return the processor's seconds that `work` takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def contestants(tokenizer: Tokenizer, fast: bool) -> dict[str, Callable[[list[str]], object]]:
    """Return what encodes texts, by name."""
    theirs = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    theirs.encode_special_tokens = True
    slow = DocumentEncoder(tokenizer)

    def with_tokenizers(texts: list[str]) -> None:
        for batch in batches(texts):
            theirs.encode_batch_fast(batch, add_special_tokens=False)

    def encoded(encoder: DocumentEncoder) -> Callable[[list[str]], object]:
        return lambda texts: [encoder.encode(batch) for batch in batches(texts)]

    found: dict[str, Callable[[list[str]], object]] = {
        "tokenizers, encode_batch_fast": with_tokenizers,
        "DocumentEncoder over tokenizers": encoded(slow),
    }
    if fast:
        quick = DocumentEncoder(tokenizer, fast=True)
        backend = FastBackend(tokenizer.to_json())
        found |= {
            "DocumentEncoder over gigatoken": encoded(quick),
            "gigatoken alone, text by text": lambda texts: [backend.encode(text) for text in texts],
            "str.encode alone": lambda texts: [text.encode() for text in texts],
        }
    return found


def main(
    source: str = "builtin",
    tokenizer: str | None = None,
    vocab_size: int = 32000,
    megabytes: float = 16,
    rounds: int = 5,
) -> None:
    """Print a line for each contestant.

    Args:
        source: Where the text comes from, as for prepare_data.
        tokenizer: A tokenizer in any format; by default one is trained on the text.
        vocab_size: Entries of the tokenizer that is trained.
        megabytes: Text that each contestant encodes in a round.
        rounds: How often.
    """
    texts = texts_of(source, megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    if tokenizer is None:
        taken = seconds(lambda: Tokenizer.train(iter(texts), vocab_size))
        print(f"training {vocab_size:,} entries: {size / taken:.1f} MB/s")
    used = Tokenizer.train(iter(texts), vocab_size) if tokenizer is None else Tokenizer.load(tokenizer)
    choice = choose_encoder(used, texts)
    print(f"{len(texts):,} texts, {size:.1f} MB; {used.vocab_size:,} entries; {choice.name}: {choice.reason}")
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        # New ones in each round: what they have seen is forgotten.
        for name, encode in contestants(used, choice.fast).items():
            taken = seconds(lambda encode=encode: encode(texts))
            rates.setdefault(name, []).append(size / taken)
    first = next(iter(rates.values()))
    for name, measured in rates.items():
        ratio = statistics.median(rate / other for rate, other in zip(measured, first, strict=True))
        spread = max(measured) / min(measured) - 1
        print(f"{name:34}{statistics.median(measured):9.1f} MB/s {spread:6.0%} {ratio:8.1f}x")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
