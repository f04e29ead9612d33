"""Answers questions about texts with the tokenizer and the engine of one version."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.adapters.store import LoadedAdapter
from llama_ray.generation.completion import GenerationError
from llama_ray.generation.sampling.params import SamplingParams, TokenLogprob
from llama_ray.utils.panics import panics_as_errors
from serve_app.errors import INTERNAL_ERROR
from serve_app.registry.messages import AdapterVersion
from serve_app.replica.adapters import AdapterError
from serve_app.replica.served_engine import ServedEngine, adapter_failure
from serve_app.streams.messages import Encoding, Failure
from serve_app.streams.questions import (
    Describe,
    Description,
    Detokenize,
    Detokenized,
    Embed,
    Embedded,
    Question,
    Reply,
    Score,
    Scored,
    TextScore,
    Tokenize,
    Tokenized,
)

_log = logging.getLogger(__name__)

# Only the prompt's own log-probabilities are wanted, and of each position the most probable token.
_SCORING = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=1)


async def reply(served: ServedEngine, question: Question, adapter: AdapterVersion | None = None) -> Reply:
    """Return the answer, with an adapter if one is named, or why there is none.

    Raises GenerationError if the engine has ended.
    """
    try:
        with panics_as_errors():
            return await _reply(served, question, await served.adapter(adapter))
    except Exception as error:
        if served.ended is not None:
            raise GenerationError(served.ended) from error
        return _failure(error)


def _failure(error: Exception) -> Failure:
    if isinstance(error, GenerationError):
        return Failure(500, str(error), code="generation_failed")
    if isinstance(error, AdapterError):
        return adapter_failure(error)
    if isinstance(error, ValueError):
        return Failure(400, str(error))
    _log.error("a question fails", exc_info=error)
    return Failure(500, INTERNAL_ERROR)


async def _reply(served: ServedEngine, question: Question, adapter: LoadedAdapter | None) -> Reply:
    tokenizer = served.tokenizer_of(adapter)
    match question:
        case Tokenize():
            ids = await served.encode(
                question.prompt, Encoding(question.add_special_tokens, parse_special=True), adapter
            )
            texts = await served.aside(lambda: _texts(tokenizer, ids))
            return Tokenized(ids, texts, served.engine.max_seq_len)
        case Detokenize():
            given = question.token_ids
            _check_ids(given, served.engine.config.vocab_size, served.engine.max_seq_len)
            return Detokenized(await served.aside(lambda: tokenizer.decode(given, skip_special=False)))
        case Describe():
            templates = tokenizer.chat_template.templates if tokenizer.chat_template else {}
            vocab_size, limit = served.engine.config.vocab_size, served.engine.max_seq_len
            return Description(tokenizer.special_names(), dict(templates), vocab_size, limit)
        case Score():
            pairs = zip(question.contexts, question.texts, strict=True)
            # One by one: all of them with their contexts may be gigabytes.
            prompts = [await _scored_prompt(served, context, text) for context, text in pairs]
            scores = (_score(served, prompt, adapter) for prompt in prompts)
            return Scored(await asyncio.gather(*scores))
        case Embed():
            return await _embed(served, question.prompts, adapter)


def _texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [tokenizer.decode([token], skip_special=False) for token in ids]


def _check_ids(ids: Sequence[int], vocab_size: int, limit: int) -> None:
    if len(ids) > limit:
        raise ValueError(
            f"tokens has {len(ids):,} ids; it must have at most max_seq_len, {limit}; send fewer at a time"
        )
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"tokens has {token}; a token id must be from 0 to {vocab_size - 1}")


async def _embed(
    served: ServedEngine, prompts: Sequence[str | list[int]], adapter: LoadedAdapter | None
) -> Embedded:
    embeddings, count = list[list[float]](), 0
    for prompt in prompts:
        ids = await served.encode(prompt)
        count += len(ids)
        # One at a time: streams go on between them.
        embeddings.append(await served.call(partial(served.engine.embed, ids, adapter=adapter)))
    return Embedded(embeddings, count)


@dataclass(frozen=True)
class _ScoredPrompt:
    """A context and a text: the text begins with token `begin`, and has `text_bytes` in UTF-8."""

    ids: list[int]
    begin: int
    text_bytes: int


async def _scored_prompt(served: ServedEngine, context: str, text: str) -> _ScoredPrompt:
    """Encode a text. Where tokens reach over the border, all that differ from the context's belong to the text."""
    ids = await served.encode(context + text)
    begin = _common(ids, await served.encode(context)) if context else _added_before(served.tokenizer)
    return _ScoredPrompt(ids, begin, len(text.encode()))


async def _score(served: ServedEngine, prompt: _ScoredPrompt, adapter: LoadedAdapter | None) -> TextScore:
    reported = (await served.complete(prompt.ids, _SCORING, adapter)).prompt_logprobs or []
    return _text_score(served.tokenizer, prompt, [None, *reported])


def _text_score(tokenizer: Tokenizer, prompt: _ScoredPrompt, entries: list[TokenLogprob | None]) -> TextScore:
    ids, begin = prompt.ids, prompt.begin
    scored = [entry for entry in entries[begin:] if entry is not None]
    unscored = tokenizer.decode(ids[begin : len(ids) - len(scored)])
    return TextScore(
        token_ids=ids[begin:],
        tokens=_texts(tokenizer, ids[begin:]),
        logprobs=[None if entry is None else entry.logprob for entry in entries[begin:]],
        scored_bytes=max(prompt.text_bytes - len(unscored.encode()), 0),
        is_greedy=all(entry.top[0][0] == entry.token_id for entry in scored),
        prompt_tokens=len(ids),
    )


def _common(ids: Sequence[int], context: Sequence[int]) -> int:
    """Return the number of tokens that both begin with."""
    pairs = enumerate(zip(ids, context, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(context)))


def _added_before(tokenizer: Tokenizer) -> int:
    """Return the number of tokens that a prompt gets before its text."""
    added = tokenizer.encode_prompt("")
    return int(bool(added) and added[0] == tokenizer.bos_id)
