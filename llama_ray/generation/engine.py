"""The engine: requests go in, every step gives each running sequence one more token."""

from __future__ import annotations

import itertools
import json
import operator
import random
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from tqdm import tqdm

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.generation.kv_cache import KVCache
from llama_ray.generation.runner import Runner
from llama_ray.generation.sampler import sample
from llama_ray.generation.sampling import SamplingParams, TokenLogprob
from llama_ray.generation.scheduler import Scheduler
from llama_ray.generation.sequence import Delta, FinishReason
from llama_ray.generation.sequence import Sequence as Candidate
from llama_ray.generation.text import TextOutput
from llama_ray.model.llama import Llama
from llama_ray.pretrained import load_pretrained, resolve

Prompt = str | Sequence[int]

# Prompt tokens that one step takes in; at this size the products are as efficient as they get, and what other
# sequences wait for one step stays bounded.
PREFILL_TOKENS = 2048


class GenerationError(RuntimeError):
    """A request that was accepted but could not be finished; the message gives the cause."""


@dataclass(frozen=True)
class Completion:
    """One candidate, finished: `finish_reason` is "stop" (end-of-text token or stop string) or "length".

    `token_ids` include the end-of-text token or the stop string's tokens, though `text` does not. `logprobs` has an
    entry for each of them, or is None where the request did not ask.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None
    prompt_token_ids: list[int]


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing and has done: sequences now, tokens and requests since it was made."""

    running: int
    waiting: int
    requests: int
    prompt_tokens: int
    generated_tokens: int
    max_batch_size: int
    kv_cache_bytes: int


class Engine:
    """Generates for many requests at once, each with its own parameters, on one device.

    Sequences join and leave the batch at every step. At most `max_batch_size` run together, each up to
    `max_seq_len` tokens of prompt and output (None: the model's); memory for them is reserved here, and ValueError
    is raised where it is not there. Requests without a seed draw theirs from `seed` in the order in which they
    come; None draws anew in every process. `eos_ids` end a completion beside the tokenizer's own.

    `submit` and `abort` may be called from any thread; `step`, and `generate`, from one at a time.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer | None,
        *,
        max_batch_size: int = 16,
        max_seq_len: int | None = None,
        seed: int | None = 0,
        eos_ids: Collection[int] = (),
    ) -> None:
        limit = model.config.max_seq_len
        max_seq_len = limit if max_seq_len is None else max_seq_len
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size is {max_batch_size}; it must be at least 1")
        if not 2 <= max_seq_len <= limit:
            raise ValueError(f"max_seq_len is {max_seq_len}; it must be from 2 to {limit}, the model's limit")
        weight = model.embed_tokens.weight
        cache = KVCache(model.config, max_batch_size, max_seq_len, weight.dtype, weight.device)
        self.tokenizer = tokenizer
        self.config = model.config
        self.max_batch_size, self.max_seq_len = max_batch_size, max_seq_len
        own_eos = {tokenizer.eos_id} if tokenizer is not None else set()
        self.eos_ids = frozenset(e for e in {*own_eos, *eos_ids} if e is not None)
        self._runner = Runner(model, cache)
        self._scheduler = Scheduler(max_batch_size, PREFILL_TOKENS)
        self._lock = threading.Lock()  # held over the scheduler and the counters, never during a forward pass
        self._seeds = random.Random(seed)
        self._requests = itertools.count()
        self._submitted = self._prompt_tokens = self._generated_tokens = 0

    @classmethod
    def from_pretrained(
        cls,
        ref: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Self:
        """An engine for what `ref` stands for: a directory, `models:/name/version` or `models:/name@alias`.

        `dtype` None keeps the stored one; `device` None takes CUDA where there is one; `options` are those of the
        constructor. Raises ValueError for a checkpoint that cannot be read.
        """
        directory = resolve(ref)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, tokenizer = load_pretrained(directory, dtype=dtype, device=device)
        options.setdefault("eos_ids", _eos_ids(directory))
        return cls(model, tokenizer, **options)

    def generate(
        self,
        prompts: str | Iterable[Prompt],
        params: SamplingParams | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Complete every prompt, text or token ids; `params.n` completions for each, in the order of the prompts.

        `progress` shows a bar on stderr. All prompts are checked before any is run. Raises ValueError for a bad
        prompt or while other requests are in progress (their deltas would be lost), and GenerationError where the
        model's numbers overflow.
        """
        if self.has_work:
            raise ValueError(
                "the engine has other requests in progress; wait for them, or use submit and step"
            )
        params = params or SamplingParams()
        encoded = [self.encode(p) for p in ([prompts] if isinstance(prompts, str) else prompts)]
        ids: list[int] = []
        merged: dict[tuple[int, int], Delta] = {}
        try:
            for prompt in encoded:
                ids.append(self.submit(prompt, params))
            with _Progress(len(encoded) * params.n, shown=progress) as bar:
                while self.has_work:
                    deltas = self.step()
                    bar.count(deltas)
                    for delta in deltas:
                        key = (delta.request_id, delta.index)
                        merged[key] = merged[key] + delta if key in merged else delta
        finally:  # an error, or the user's interrupt, leaves nothing behind
            for request_id in ids:
                self.abort(request_id)
        return [
            _completion(merged[request_id, index], prompt)
            for request_id, prompt in zip(ids, encoded, strict=True)
            for index in range(params.n)
        ]

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt: text is begun with bos where the tokenizer has one, ids are taken as they are.

        Raises ValueError for text where there is no tokenizer, and for what is neither text nor ids.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    "this model has no tokenizer to encode text with; give the prompt as token ids"
                )
            return self.tokenizer.encode(prompt, bos=self.tokenizer.bos_id is not None)
        try:
            return [operator.index(token) for token in prompt]
        except TypeError:
            raise ValueError(
                f"a prompt is {type(prompt).__name__}; give text or a list of token ids (integers)"
            ) from None

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a request -> its id, which its deltas carry. Raises ValueError for one that cannot be served."""
        params = params or SamplingParams()
        ids = self.encode(prompt)
        self._check(ids, params)
        with self._lock:
            request_id = next(self._requests)
            seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
            for index in range(params.n):
                text = TextOutput(self.tokenizer.stream() if self.tokenizer else None, params.stop_strings)
                self._scheduler.add(Candidate(request_id, index, ids, params, seed, text, self.eos_ids))
            self._submitted += 1
        return request_id

    def abort(self, request_id: int) -> None:
        """Drop a request; its slots are free for the next step. One that is finished or unknown is no error."""
        with self._lock:
            self._scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        with self._lock:
            return bool(self._scheduler.waiting or self._scheduler.running)

    @property
    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        with self._lock:
            return EngineStats(
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting),
                requests=self._submitted,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens,
                max_batch_size=self.max_batch_size,
                kv_cache_bytes=self._runner.cache.nbytes,
            )

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Take in what fits of the waiting prompts and give every running sequence one token.

        Returns one delta for each sequence that got a token; none where there is nothing to do.
        """
        with self._lock:
            running = sorted(self._scheduler.running.items())
            admitted = [(s.slot, s) for s in self._scheduler.admit() if s.slot is not None]
        logits = []
        if admitted:
            logits.append(
                self._runner.prefill([slot for slot, _ in admitted], [s.prompt for _, s in admitted])
            )
        if running:
            slots, sequences = zip(*running, strict=True)
            tokens = [s.output[-1] for s in sequences]
            positions = [len(s.prompt) + len(s.output) - 1 for s in sequences]
            logits.append(self._runner.decode(slots, tokens, positions))
        if not logits:
            return []
        batch = admitted + running
        samples = sample(torch.cat(logits), [s for _, s in batch])

        deltas = []
        with self._lock:
            self._prompt_tokens += sum(len(s.prompt) for _, s in admitted)
            for (slot, sequence), outcome in zip(batch, samples, strict=True):
                if outcome.token_id is None:
                    self._runner.cache.clear(slot)
                if sequence.slot is None:  # aborted while the model ran
                    continue
                delta = sequence.append(outcome)
                self._generated_tokens += len(delta.token_ids)
                if delta.finish_reason is not None:
                    self._scheduler.release(sequence)
                deltas.append(delta)
        return deltas

    def _check(self, ids: Sequence[int], params: SamplingParams) -> None:
        vocab_size = self.config.vocab_size
        if not ids:
            raise ValueError(
                "the prompt is empty and the model has no token to begin with; give at least one token"
            )
        outside = next((t for t in (*ids, *(params.logit_bias or ())) if not 0 <= t < vocab_size), None)
        if outside is not None:
            raise ValueError(
                f"token id {outside} is outside the model's vocabulary of {vocab_size} (0 to {vocab_size - 1})"
            )
        if len(ids) >= self.max_seq_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, which leaves no room for an answer within max_seq_len "
                f"{self.max_seq_len}; shorten the prompt"
            )
        if len(ids) + params.max_tokens > self.max_seq_len:
            raise ValueError(
                f"the prompt's {len(ids)} tokens and max_tokens {params.max_tokens} exceed max_seq_len "
                f"{self.max_seq_len}; set max_tokens to at most {self.max_seq_len - len(ids)} or shorten the prompt"
            )
        if params.stop_strings and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has none")


class _Progress:
    """A bar of finished completions on stderr, with the tokens so far and their rate."""

    def __init__(self, completions: int, *, shown: bool) -> None:
        # miniters 0: long completions move the count of tokens for a while before they move the bar
        self._bar = tqdm(total=completions, unit="completion", miniters=0, disable=not shown)
        self._start, self._tokens = time.perf_counter(), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def count(self, deltas: list[Delta]) -> None:
        """Take note of what a step gave."""
        self._tokens += sum(len(delta.token_ids) for delta in deltas)
        rate = self._tokens / (time.perf_counter() - self._start)
        self._bar.set_postfix_str(f"{self._tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)
        self._bar.update(sum(delta.finish_reason is not None for delta in deltas))


def _completion(delta: Delta, prompt: list[int]) -> Completion:
    if delta.finish_reason is None or delta.error is not None:
        raise GenerationError(delta.error or "the request was aborted")
    return Completion(delta.text, delta.token_ids, delta.finish_reason, delta.logprobs, prompt)


def _eos_ids(directory: Path) -> list[int]:
    """The `eos_token_id` of generation_config.json (one or several), where the checkpoint has that file."""
    file = directory / "generation_config.json"
    if not file.is_file():
        return []
    try:
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as e:
        raise ValueError(
            f"{file} is not a JSON object ({e}); save the checkpoint again or remove the file"
        ) from e
    return [ids] if isinstance(ids, int) else list(ids or ())
