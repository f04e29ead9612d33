"""The engine: requests go in, and every step gives each running sequence one more token."""

from __future__ import annotations

import itertools
import random
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.adapters.store import Adapters, Base, LoadedAdapter
from llama_ray.generation.backends.backend import Backend
from llama_ray.generation.backends.prepare import as_backend
from llama_ray.generation.backends.runner import RunnerError
from llama_ray.generation.caches import make_caches
from llama_ray.generation.completion import Completion, GenerationError
from llama_ray.generation.constraints.grammars import Grammars
from llama_ray.generation.core import Core
from llama_ray.generation.end_of_text import all_eos_ids
from llama_ray.generation.limits import Limits
from llama_ray.generation.loading import load
from llama_ray.generation.options import EngineOptions, RunOptions
from llama_ray.generation.parallel.sharded_model import ShardedModel
from llama_ray.generation.progress import ProgressBar
from llama_ray.generation.request import Done, Prompt, Request, RequestMaker, one_for_each
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.blocks import BlockPool
from llama_ray.generation.scheduling.scheduler import Scheduler
from llama_ray.generation.scheduling.sequence import Delta, SequenceState
from llama_ray.generation.speculation.proposer import Proposer
from llama_ray.generation.stats import EngineStats
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.utils.errors import printable
from llama_ray.utils.panics import panics_as_errors


class Engine:
    """Generates for many requests at once, each with its own parameters, on one device.

    Sequences join and leave the batch at every step. `options`, or their fields as keywords (`max_num_seqs=8`), are
    `RunOptions`. `proposer` drafts tokens, which changes no output. Requests without a seed draw theirs from `seed` in
    order of arrival; with None each process draws others. `eos_ids` end a completion beside the tokenizer's own
    end-of-text token. `files` are those of the model, which adapters are held against. `sharded` is given if `model` is
    rank 0's shard of a model on several ranks; the processes of the other ranks end with `close`, with a `with` block,
    and when the engine is garbage-collected. Raises ValueError for options and ids that do not fit the model or the
    free memory.

    `submit` and `abort` may be called from any thread; `step` and `generate` from one thread at a time.
    """

    def __init__(
        self,
        model: Llama | Backend,
        tokenizer: Tokenizer | None,
        options: RunOptions | None = None,
        *,
        proposer: Proposer | None = None,
        seed: int | None = 0,
        eos_ids: Collection[int] = (),
        files: Path | None = None,
        sharded: ShardedModel | None = None,
        **fields: Any,
    ) -> None:
        options = replace(options or RunOptions(), **fields)
        backend = as_backend(model)
        self.tokenizer, self.config = tokenizer, backend.model.config
        self.max_num_seqs, self.max_loras = options.max_num_seqs, options.max_loras
        self.max_seq_len = _max_seq_len(options, self.config)
        self.eos_ids = all_eos_ids(tokenizer, eos_ids, self.config.vocab_size)
        self._sharded, self._backend = sharded, backend
        self._weight_bytes = sharded.weight_bytes if sharded else backend.weight_bytes
        caches = make_caches(
            backend, proposer, sharded, self.max_num_seqs, self.max_seq_len, options.kv_cache_memory_bytes
        )
        self._kv_cache_bytes = caches.nbytes
        self._scheduler = Scheduler(
            BlockPool(caches.num_blocks, backend.block_size, caching=options.enable_prefix_caching),
            options.max_num_seqs,
            options.batch_tokens(backend.device),
            options.max_loras,
        )
        self._adapters = Adapters(
            Base(self.config, tokenizer, self.eos_ids, files),
            partial(backend.adapter_kernels, options.max_loras),
            options.max_lora_rank,
        )
        # Held over the scheduler and the counters, never during a forward pass.
        self._lock = threading.Lock()
        num_draft_tokens = options.num_draft_tokens if proposer else 0
        self._core = Core(
            self._scheduler, caches.runner, backend.make_sampler(), self._lock, proposer, num_draft_tokens
        )
        limits = Limits(
            self.config.vocab_size,
            self.max_seq_len,
            has_tokenizer=tokenizer is not None,
            max_token_bytes=tokenizer.max_token_bytes() if tokenizer else None,
        )
        self._grammars = Grammars(tokenizer, self.config.vocab_size, self.eos_ids)
        self._maker = RequestMaker(tokenizer, limits, self._grammars, self.eos_ids)
        # Requests that another engine has begun, and whose tokens end them.
        self._ended: list[SequenceState] = []
        self._seeds = random.Random(seed)
        self._requests = itertools.count()
        self._submitted = 0

    @classmethod
    def from_pretrained(
        cls,
        ref: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        options: EngineOptions | None = None,
        *,
        seed: int | None = 0,
        adapters: Mapping[str, str | Path] | None = None,
        **fields: Any,
    ) -> Self:
        """Return an engine for `ref`: a directory, `models:/name@alias`, `hf://org/name` or others, see `resolve`.

        `dtype` None keeps the stored one; `device` None takes CUDA if there is a GPU. `options`, or their fields as
        keywords (`quantization="int8"`), are `EngineOptions`; for `seed` see `Engine`. `adapters` are references by
        name, for `add_adapter`. Raises ValueError for a checkpoint that cannot be read or divided, and for options that
        do not fit.
        """
        options = replace(options or EngineOptions(), **fields)
        loaded = load(ref, dtype, device, options)
        try:
            engine = cls(
                loaded.backend,
                loaded.tokenizer,
                options,
                proposer=loaded.proposer,
                seed=seed,
                eos_ids=loaded.eos_ids,
                files=loaded.files,
                sharded=loaded.sharded,
            )
            for name, adapter in (adapters or {}).items():
                engine.add_adapter(name, adapter)
            return engine
        except BaseException:
            if loaded.sharded is not None:
                loaded.sharded.close()
            raise

    def close(self) -> None:
        """End the processes of the other ranks and of grammars, if there are any; steps then raise RunnerError."""
        self._grammars.close()
        if self._sharded is not None:
            self._sharded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add_adapter(self, name: str, ref: str | Path) -> LoadedAdapter:
        """Read an adapter, which requests then can name; may be called from any thread, while steps go on.

        `ref` is a directory in PEFT's layout, or any other reference to one that `pretrained.resolve` knows. The
        adapter is kept in host memory. If it comes with a tokenizer, which must have the ids of the model's, its chat
        template is that of requests with the adapter. Raises ValueError for a name that is taken, an adapter that
        cannot be read, was trained on other weights, or has a rank above `max_lora_rank`, and with tensor parallelism.
        """
        if self._sharded is not None:
            raise ValueError(
                f"adapter {printable(name)}: adapters need tensor_parallel 1; set it, or merge the adapter into its "
                "base model and load the result"
            )
        return self._adapters.add(name, ref)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; requests that have it go on with it. Raises ValueError for an unknown name."""
        self._adapters.remove(name)

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that requests can have."""
        return self._adapters.names

    def generate(
        self,
        prompts: str | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Complete every prompt (text or token ids); return `n` completions for each, in the order of the prompts.

        `sampling_params` and `adapter`, a name of `add_adapter`, are one for all prompts, or one for each. `progress`
        shows a bar on stderr. All prompts are checked before any is run. Raises ValueError for a bad prompt or while
        other requests are in progress (their deltas would be lost), and GenerationError if the model's numbers overflow
        or the engine has ended.
        """
        if self.has_work:
            raise ValueError(
                "the engine has other requests in progress; wait for them, or use submit and step"
            )
        requests = self._requests_for(prompts, sampling_params, adapter)
        request_ids: list[int] = []
        deltas: defaultdict[tuple[int, int], list[Delta]] = defaultdict(list)
        try:
            for request in requests:
                request_ids.append(self.add(request))
            with ProgressBar(sum(request.params.n for request in requests), shown=progress) as bar:
                while self.has_work:
                    new = self.step()
                    bar.count(new)
                    for delta in new:
                        deltas[delta.request_id, delta.index].append(delta)
        except RunnerError as error:
            raise GenerationError(str(error)) from error
        finally:
            # An error or Ctrl-C leaves no request behind.
            for request_id in request_ids:
                self.abort(request_id)
        return [
            Completion.of(deltas[request_id, index], request.prompt)
            for request_id, request in zip(request_ids, requests, strict=True)
            for index in range(request.params.n)
        ]

    def _requests_for(
        self,
        prompts: str | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: str | Sequence[str | None] | None,
    ) -> list[Request]:
        """Return the checked request for each prompt."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        given = SamplingParams() if sampling_params is None else sampling_params
        params = one_for_each("sampling_params", given, SamplingParams, len(prompts))
        names: Sequence[str | None] = one_for_each("adapter", adapter, str, len(prompts))
        encoded = [self.encode(prompt, adapter=name) for prompt, name in zip(prompts, names, strict=True)]
        return [
            self.prepare(ids, own, adapter=name)
            for ids, own, name in zip(encoded, params, names, strict=True)
        ]

    def _adapter(self, adapter: str | LoadedAdapter | None) -> LoadedAdapter | None:
        return self._adapters.find(adapter) if isinstance(adapter, str) else adapter

    @panics_as_errors()
    def encode(
        self,
        prompt: Prompt,
        *,
        adapter: str | LoadedAdapter | None = None,
        add_special_tokens: bool = True,
        parse_special: bool = False,
    ) -> list[int]:
        """Return a prompt's token ids: text is encoded as `Tokenizer.encode_prompt` does it, ids stay as they are.

        A conversation is rendered by the chat template of `adapter`, if that has one. Raises ValueError for text
        without a tokenizer, for a prompt that is neither text nor ids, and for an unknown adapter.
        """
        return self._maker.encode(
            prompt,
            self._adapter(adapter),
            add_special_tokens=add_special_tokens,
            parse_special=parse_special,
        )

    def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str | LoadedAdapter | None = None,
    ) -> int:
        """Queue a request; return its id, which its deltas carry. Raises ValueError if it cannot be served."""
        return self.add(self.prepare(prompt, sampling_params, adapter=adapter))

    @panics_as_errors()
    def prepare(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        done: Done | None = None,
        *,
        adapter: str | LoadedAdapter | None = None,
    ) -> Request:
        """Return a request that has been checked, for `add`.

        `adapter` is what `add_adapter` returned, or its name. `done` makes it the rest of a request that another
        engine, of the same model, has begun: for each candidate the tokens that were reported, or None if it is
        complete; a candidate that is not named begins now. The deltas go on exactly where those of the other engine
        ended. Takes no lock: text is encoded and a grammar compiled while steps and other submissions go on. Raises
        ValueError if it cannot be served, and GenerationError if it has a grammar and the engine is closed.
        """
        return self._maker.make(
            prompt, sampling_params or SamplingParams(), done or {}, self._adapter(adapter)
        )

    def add(self, request: Request) -> int:
        """Queue a request that this engine has prepared; return its id. Never waits for long."""
        with self._lock:
            request_id = next(self._requests)
            seed = request.params.seed
            seed = self._seeds.getrandbits(64) if seed is None else seed
            for sequence in request.sequences:
                sequence.arrive(request_id, seed)
                if sequence.ended:
                    self._ended.append(sequence)
                else:
                    self._scheduler.add(sequence)
            self._submitted += 1
        return request_id

    @panics_as_errors()
    @torch.inference_mode()
    def embed(self, prompt: Prompt, *, adapter: str | LoadedAdapter | None = None) -> list[float]:
        """Return the mean of the hidden states after the last norm over a prompt, as `hidden_size` floats.

        Takes one forward pass over the whole prompt, without the cache; like `step`, from one thread at a time. Raises
        ValueError for a prompt that is empty or too long, and for a model that is divided among processes.
        """
        if self._sharded is not None:
            raise ValueError("embeddings need tensor_parallel 1, because other ranks only take part in steps")
        sequence = self.prepare(prompt, SamplingParams(max_tokens=1), adapter=adapter).sequences[0]
        backend, ids = self._backend, sequence.prompt
        tokens = torch.tensor([ids], device=backend.device)
        with backend.adapters.rows([(sequence.adapter, len(ids))]):
            mean: list[float] = backend.model.hidden(tokens)[0].float().mean(dim=0).tolist()
        return mean

    def abort(self, request_id: int) -> None:
        """Drop a request and free its blocks for the next step; do nothing if it is finished or unknown.

        A step in progress gives it no delta, but counts on its sequences, which end with the step.
        """
        with self._lock:
            self._core.abort(request_id)
            self._ended = [sequence for sequence in self._ended if sequence.request_id != request_id]

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        with self._lock:
            return self._scheduler.has_work or bool(self._ended)

    @property
    def stats(self) -> EngineStats:
        """What the engine does now and has done so far."""
        with self._lock:
            scheduler, pool = self._scheduler, self._scheduler.pool
            return EngineStats(
                running=len(scheduler.running),
                waiting=scheduler.num_waiting,
                requests=self._submitted,
                **self._core.counts,
                preemptions=scheduler.preemptions,
                evictions=pool.evictions,
                blocks=pool.num_blocks - 1,
                blocks_in_use=pool.in_use,
                block_size=pool.block_size,
                max_num_seqs=self.max_num_seqs,
                kv_cache_bytes=self._kv_cache_bytes,
                weight_bytes=self._weight_bytes,
                last_step=self._core.last_step,
            )

    def step(self) -> list[Delta]:
        """Compute one step: a token for each sequence that generates, and as much of the waiting prompts as fits.

        Return a delta for each sequence that got a token or failed; the list is empty if there is nothing to do, or the
        step only computed the middle of prompts or lacked the masks of grammars. A step that runs out of memory is
        repeated with smaller limits; a sequence that cannot be computed fails, and the others continue. Raises
        RunnerError if a worker process has ended, since no step can be computed then.
        """
        with self._lock:
            ended, self._ended = self._ended, []
        return [sequence.end() for sequence in ended] + self._core.step()


def _max_seq_len(options: RunOptions, config: LlamaConfig) -> int:
    limit = config.max_seq_len
    if options.max_seq_len is not None and options.max_seq_len > limit:
        raise ValueError(
            f"max_seq_len is {options.max_seq_len}; it must be from 2 to {limit}, the model's limit"
        )
    return options.max_seq_len or limit
