"""What a prompt becomes before it is queued: checked token ids, and the candidates that will complete it."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from llama_ray.data.chat.encoding import ChatText
from llama_ray.data.chat.template import ChatPrompt
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.adapters.store import LoadedAdapter
from llama_ray.generation.completion import GenerationError
from llama_ray.generation.constraints.grammar import Constraint
from llama_ray.generation.constraints.grammars import Grammars
from llama_ray.generation.constraints.processes import Closed
from llama_ray.generation.limits import Limits
from llama_ray.generation.sampling.bad_words import BadWords
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import SequenceState
from llama_ray.generation.scheduling.text import TextOutput

Value = TypeVar("Value")
Prompt = str | Sequence[int] | ChatPrompt | ChatText
Done = Mapping[int, Sequence[int] | None]
"""Of each candidate that has begun elsewhere the tokens so far; None if it is complete."""


@dataclass(frozen=True)
class Request:
    """A prompt that an engine has prepared, to be added to it once: a sequence for each candidate to generate."""

    prompt: list[int]
    params: SamplingParams
    sequences: list[SequenceState]


def one_for_each(name: str, given: Value | Sequence[Value], kind: type, count: int) -> Sequence[Value]:
    """Return a value for each of `count` prompts: `given`, which is one for all if it is a `kind` or None.

    Raises ValueError, which calls it `name`, if it has another number of values.
    """
    if given is None or isinstance(given, kind):
        return [cast(Value, given)] * count
    values = cast(Sequence[Value], given)
    if len(values) != count:
        raise ValueError(
            f"{name} has {len(values)} entries and prompts {count}; give one for each prompt, or one for all"
        )
    return values


class RequestMaker:
    """Makes requests of prompts for one engine. Safe to call from any thread."""

    def __init__(
        self, tokenizer: Tokenizer | None, limits: Limits, grammars: Grammars, eos_ids: Collection[int]
    ) -> None:
        self._tokenizer, self._limits, self._grammars, self._eos_ids = tokenizer, limits, grammars, eos_ids

    def encode(
        self,
        prompt: Prompt,
        adapter: LoadedAdapter | None = None,
        *,
        add_special_tokens: bool = True,
        parse_special: bool = False,
    ) -> list[int]:
        """See `Engine.encode`."""
        if isinstance(prompt, (str, ChatPrompt, ChatText)):
            tokenizer = adapter.tokenizer if adapter else self._tokenizer
            if tokenizer is None:
                raise ValueError(
                    "this model has no tokenizer to encode text with; give the prompt as token ids"
                )
            return self._encode_text(
                tokenizer, prompt, add_special_tokens=add_special_tokens, parse_special=parse_special
            )
        try:
            return [operator.index(token) for token in prompt]
        except TypeError:
            raise ValueError(
                f"a prompt is {type(prompt).__name__}; give text or a list of token ids (integers)"
            ) from None

    def _encode_text(
        self, tokenizer: Tokenizer, prompt: str | ChatPrompt | ChatText, **options: bool
    ) -> list[int]:
        if isinstance(prompt, ChatPrompt):
            prompt = tokenizer.render_chat(prompt)
        self._limits.check_text(prompt if isinstance(prompt, str) else prompt.text)
        if isinstance(prompt, ChatText):
            return tokenizer.encode_chat(prompt)
        return tokenizer.encode_prompt(prompt, **options)

    def make(
        self, prompt: Prompt, params: SamplingParams, done: Done, adapter: LoadedAdapter | None = None
    ) -> Request:
        """See `Engine.prepare`."""
        ids = self.encode(prompt, adapter)
        self._limits.check(ids, params)
        self._limits.check_done(done, params)
        indices = [index for index in range(params.n) if done.get(index, ()) is not None]
        bad_words = self._bad_words(params)
        sequences: list[SequenceState] = []
        leader: SequenceState | None = None
        for index, constraint in zip(indices, self._constraints(params, len(indices)), strict=True):
            output = done.get(index) or ()
            # Candidates that begin now share the prompt of the first of them; others have more than it to compute.
            of = None if output else leader
            sequence = self._sequence(index, ids, params, constraint, of, bad_words, adapter)
            if output:
                sequence.resume(output)
            elif leader is None:
                leader = sequence
            sequences.append(sequence)
        return Request(ids, params, sequences)

    def _bad_words(self, params: SamplingParams) -> BadWords | None:
        if not params.bad_word_strings or self._tokenizer is None:
            return None
        return BadWords.of(params.bad_word_strings, self._tokenizer.encode, self._limits.vocab_size)

    def _constraints(self, params: SamplingParams, count: int) -> Sequence[Constraint | None]:
        if params.grammar is None:
            return [None] * count
        try:
            return self._grammars.constraints(*params.grammar, count)
        except Closed as error:
            raise GenerationError(str(error)) from None

    def _sequence(
        self,
        index: int,
        prompt: list[int],
        params: SamplingParams,
        constraint: Constraint | None,
        leader: SequenceState | None,
        bad_words: BadWords | None,
        adapter: LoadedAdapter | None,
    ) -> SequenceState:
        # What a grammar allows is the text itself: none of it is dropped at the start.
        at_start = constraint is None
        stream = self._tokenizer.stream(prompt, at_start) if self._tokenizer else None
        include = params.include_stop_str_in_output
        text = TextOutput(stream, params.stop_strings, params.min_tokens, include_stop=include)
        eos_ids, weights = (adapter.eos_ids, adapter.adapter) if adapter else (self._eos_ids, None)
        return SequenceState(index, prompt, params, text, eos_ids, constraint, leader, bad_words, weights)
