"""Bits per byte and perplexity of documents, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.evaluation.results import EvaluationError, Score, fingerprint
from llama_ray.evaluation.scoring import Report, Scorer, Scoring, no_report
from llama_ray.evaluation.texts import Corpus
from llama_ray.utils.errors import printable

_MOST_UNKNOWN = 1e-3
"""The share of unknown tokens that changes scores by less than chance does."""
DEFAULT_CONTEXT = 2048
"""Tokens that a window holds at most, if the model can read so many."""


def measure(
    scorer: Scorer, corpora: Sequence[Corpus], context: int, stride: int, report: Report = no_report
) -> list[Score]:
    """Return `bits_per_byte` and `perplexity` of each corpus, all asked for at once.

    Each document is read on its own, after bos (or eos, for a tokenizer without bos). A token is predicted from all
    that is before it in its document, up to `context` tokens and at least `context - stride`; every token counts once.
    Bits per byte are the bits of all tokens divided by the bytes of the text in UTF-8, so that they compare models of
    different tokenizers (Gao et al. 2020, arXiv:2101.00027); the perplexity is that of a token. Standard errors are
    those of a ratio of sums over documents (Cochran 1977, section 6.4). Raises EvaluationError if the model cannot be
    asked, or its tokenizer has no tokens for more than a few characters: what it need not tell apart costs no bits.
    """
    check_windows(context, stride, scorer.max_seq_len)
    documents = [[_encode(scorer.tokenizer, text) for text in corpus.documents] for corpus in corpora]
    for corpus, encoded in zip(corpora, documents, strict=True):
        _check_known(scorer.tokenizer, corpus, encoded)
    asked = [
        [list(windows(ids, context, stride)) for ids in documents_of_one] for documents_of_one in documents
    ]
    requests = [window for corpus in asked for document in corpus for window in document]
    answers = iter(scorer.score(requests, report))
    made_with = {"context": context, "stride": stride}
    scores: list[Score] = []
    for corpus, encoded, asked_of_one in zip(corpora, documents, asked, strict=True):
        nats = [
            -math.fsum(nat for _ in document for nat in next(answers).logprobs) for document in asked_of_one
        ]
        tokens = [len(ids) - 1.0 for ids in encoded]
        scores += _scores(corpus, nats, tokens, made_with, scorer.tokenizer.fingerprint)
    return scores


def _scores(
    corpus: Corpus, nats: Sequence[float], tokens: Sequence[float], made_with: dict[str, int], tokenizer: str
) -> list[Score]:
    """Return the scores of documents that have these sums of -log p and these numbers of tokens."""
    bits = [value / math.log(2) for value in nats]
    sizes = [float(len(document.encode())) for document in corpus.documents]
    bits_per_byte, bits_error = ratio(bits, sizes)
    loss, loss_error = ratio(nats, tokens)
    perplexity = _exp(loss, corpus.name)
    made_from = {"documents": corpus.fingerprint, **made_with}
    return [
        Score(
            corpus.name,
            "bits_per_byte",
            bits_per_byte,
            bits_error,
            len(bits),
            higher_is_better=False,
            fingerprint=fingerprint(made_from),
            values=tuple(bits),
            weights=tuple(sizes),
        ),
        Score(
            corpus.name,
            "perplexity",
            perplexity,
            # The delta method: the derivative of exp is exp.
            None if loss_error is None else perplexity * loss_error,
            len(bits),
            higher_is_better=False,
            fingerprint=fingerprint({**made_from, "tokenizer": tokenizer}),
        ),
    ]


def windows(ids: Sequence[int], context: int, stride: int) -> Iterator[Scoring]:
    """Yield requests that together ask for each of `ids` but the first one once.

    A request has up to `context` tokens and the one that follows them. The first asks for all of its tokens, each later
    one for up to `stride` new ones at its end.
    """
    asked = 1
    while asked < len(ids):
        end = min(asked + (context if asked == 1 else stride), len(ids))
        begin = max(end - 1 - context, 0)
        yield Scoring(tuple(ids[begin:end]), asked - begin)
        asked = end


def ratio(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float | None]:
    """Return the sum of `values` by that of `weights`, and its standard error; None for a single document."""
    count, total = len(values), math.fsum(weights)
    mean = math.fsum(values) / total
    if count < 2:
        return mean, None
    squares = math.fsum((value - mean * weight) ** 2 for value, weight in zip(values, weights, strict=True))
    return mean, math.sqrt(squares * count / (count - 1)) / total


def check_windows(context: int, stride: int, max_seq_len: int) -> None:
    """Raise EvaluationError for windows that the model cannot read, or that leave tokens out."""
    if not 1 <= context <= max_seq_len:
        raise EvaluationError(
            f"context is {context}; it must be from 1 to {max_seq_len}, the model's limit; leave it out for the longest"
        )
    if not 1 <= stride <= context:
        raise EvaluationError(f"stride is {stride}; it must be from 1 to context, {context}")


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a document after the one that a document begins with."""
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if first is None:
        raise EvaluationError(
            "the tokenizer has neither bos nor eos, so that the first token of a text has nothing before it; name one "
            "of them in its tokenizer_config.json"
        )
    return [first, *tokenizer.encode(text)]


def _check_known(tokenizer: Tokenizer, corpus: Corpus, documents: Sequence[Sequence[int]]) -> None:
    total = sum(len(ids) - 1 for ids in documents)
    # No text makes special tokens, but for the one that stands for what is unknown.
    unknown = sum(token in tokenizer.special_ids for ids in documents for token in ids[1:])
    if unknown > _MOST_UNKNOWN * total:
        raise EvaluationError(
            f"there are no tokens for parts of {printable(corpus.name)} ({unknown:,} of {total:,} are unknown), "
            "which would make scores too good; measure a text that it can write"
        )


def _exp(loss: float, name: str) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        raise EvaluationError(
            f"the perplexity of {name} is exp({loss:.0f}), which no number holds; the model gives its tokens no "
            "probability at all; look at its weights"
        ) from None
