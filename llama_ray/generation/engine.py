"""The engine: requests go in, every step gives each running sequence one more token."""

from __future__ import annotations

import itertools
import json
import operator
import random
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.generation.backend import Backend
from llama_ray.generation.completion import Completion, GenerationError
from llama_ray.generation.core import Core
from llama_ray.generation.kv_cache import count_blocks
from llama_ray.generation.limits import Limits
from llama_ray.generation.parallel.sharded_model import ShardedModel
from llama_ray.generation.prepare import as_backend, prepare
from llama_ray.generation.progress import Progress
from llama_ray.generation.quantize import Quantization
from llama_ray.generation.runner import RunnerError
from llama_ray.generation.sampling.constraints import Grammars
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.blocks import BlockPool
from llama_ray.generation.scheduling.scheduler import Scheduler
from llama_ray.generation.scheduling.sequence import Delta, SequenceState
from llama_ray.generation.scheduling.text import TextOutput
from llama_ray.generation.speculation.draft_model import DraftModel
from llama_ray.generation.speculation.prompt_lookup import PromptLookup
from llama_ray.generation.speculation.proposer import Proposer
from llama_ray.generation.stats import EngineStats
from llama_ray.model.llama import Llama
from llama_ray.pretrained import load_pretrained, resolve

Prompt = str | Sequence[int]

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 256, 2048
"""Tokens that one step computes, by default: enough for matrix products to be efficient."""


class Engine:
    """Generates for many requests at once, each with its own parameters, on one device.

    Sequences join and leave the batch at every step. At most `max_num_seqs` run together, each up to
    `max_seq_len` tokens of prompt and output (None: the model's), and a step computes at most `max_num_batched_tokens`
    tokens. Their keys and values share a cache of `kv_cache_memory_bytes` (None: see `kv_cache.count_blocks`), which
    must be free now, else ValueError is raised; on a CPU it is taken block by block, when one is first written. With
    `enable_prefix_caching` prompts that begin as others did are not computed again. `proposer` guesses tokens ahead,
    `draft_tokens` at most, which changes no token that comes out. Requests without a seed draw theirs from `seed` in
    the order in which they come; None draws anew in every process. `eos_ids` end a completion beside the tokenizer's
    own. `parallel` is where `model` is only one rank's share, with the others: `kv_cache_memory_bytes` are then those
    of each rank, and the rank with the least room decides.

    An engine whose model lies on several ranks has processes that end with it: at `close`, at the end of a `with`
    block, and when nobody refers to it any more. `submit` and `abort` may be called from any thread; `step`, and
    `generate`, from one at a time.
    """

    def __init__(
        self,
        model: Llama | Backend,
        tokenizer: Tokenizer | None,
        *,
        max_num_seqs: int = 64,
        max_seq_len: int | None = None,
        max_num_batched_tokens: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        enable_prefix_caching: bool = True,
        proposer: Proposer | None = None,
        draft_tokens: int = 4,
        seed: int | None = 0,
        eos_ids: Collection[int] = (),
        parallel: ShardedModel | None = None,
    ) -> None:
        backend = as_backend(model)
        model = backend.model
        limit = model.config.max_seq_len
        max_seq_len = limit if max_seq_len is None else max_seq_len
        if max_num_batched_tokens is None:
            max_num_batched_tokens = GPU_BATCH_TOKENS if backend.device.type == "cuda" else CPU_BATCH_TOKENS
        for name, value in (
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("draft_tokens", draft_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 2 <= max_seq_len <= limit:
            raise ValueError(f"max_seq_len is {max_seq_len}; it must be from 2 to {limit}, the model's limit")
        self.tokenizer = tokenizer
        self.config = model.config
        self.max_num_seqs, self.max_seq_len = max_num_seqs, max_seq_len
        own_eos = {tokenizer.eos_id} if tokenizer is not None else set()
        self.eos_ids = frozenset(e for e in {*own_eos, *eos_ids} if e is not None)

        rank_block = backend.block_bytes
        per_block = rank_block
        if proposer is not None:
            proposer.check(model.config.vocab_size, max_seq_len)
            per_block += proposer.block_bytes
        limits = (max_num_seqs, max_seq_len)
        if parallel is None:
            blocks = count_blocks(
                per_block, backend.block_size, *limits, backend.device, kv_cache_memory_bytes
            )
            runner = backend.make_runner(blocks, *limits)
        else:
            blocks = parallel.count_blocks(per_block, *limits, kv_cache_memory_bytes)
            runner = parallel.runner(blocks)
        if proposer is not None:
            proposer.reserve(blocks, max_num_seqs, max_seq_len)
        pool = BlockPool(blocks, backend.block_size, caching=enable_prefix_caching)
        self._scheduler = Scheduler(pool, max_num_seqs, max_num_batched_tokens)
        self._lock = threading.Lock()  # held over the scheduler and the counters, never during a forward pass
        self._core = Core(self._scheduler, runner, backend.make_sampler(), self._lock, proposer, draft_tokens)
        self._parallel = parallel
        others = parallel.size - 1 if parallel else 0
        self._kv_cache_bytes = blocks * (per_block + others * rank_block)
        self._weight_bytes = parallel.weight_bytes if parallel else backend.weight_bytes
        self._limits = Limits(model.config.vocab_size, max_seq_len, has_tokenizer=tokenizer is not None)
        self._grammars = Grammars(tokenizer, model.config.vocab_size, self.eos_ids)
        self._seeds = random.Random(seed)
        self._requests = itertools.count()
        self._submitted = 0

    @classmethod
    def from_pretrained(
        cls,
        ref: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        quantization: Quantization | None = None,
        batch_invariant: bool = False,
        draft_model: str | Path | None = None,
        prompt_lookup: bool = False,
        tensor_parallel: int = 1,
        **options: Any,
    ) -> Self:
        """An engine for what `ref` stands for: a directory, `models:/name/version` or `models:/name@alias`.

        `dtype` None keeps the stored one; `device` None takes CUDA where there is one; `quantization` int8 or int4
        rounds the weights of matrix products as they are loaded; for `batch_invariant` see `prepare.prepare`.
        `draft_model`, or with `prompt_lookup` the text itself, guesses tokens ahead. `tensor_parallel` is the number
        of GPUs (on a CPU, of processes) to divide the model between, see `llama_ray.generation.parallel.runner`.
        `options` are those of the constructor. Raises ValueError for a checkpoint that cannot be read or not be
        divided so.
        """
        directory = resolve(ref)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        options.setdefault("eos_ids", _eos_ids(directory))
        if draft_model is not None:
            draft, _ = load_pretrained(draft_model, dtype=dtype, device=device)
            options["proposer"] = DraftModel(prepare(draft, quantization, batch_invariant=batch_invariant))
        elif prompt_lookup:
            options["proposer"] = PromptLookup()
        if tensor_parallel == 1:
            model, tokenizer = load_pretrained(directory, dtype=dtype, device=device)
            backend = prepare(model, quantization, batch_invariant=batch_invariant)
            return cls(backend, tokenizer, **options)
        parallel = ShardedModel(directory, dtype, device, quantization, batch_invariant, tensor_parallel)
        try:
            return cls(parallel.backend, parallel.tokenizer, parallel=parallel, **options)
        except BaseException:
            parallel.close()
            raise

    def close(self) -> None:
        """End the processes of the other ranks, where there are any; steps then raise RunnerError."""
        if self._parallel is not None:
            self._parallel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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
        model's numbers overflow or the engine has ended.
        """
        if self.has_work:
            raise ValueError(
                "the engine has other requests in progress; wait for them, or use submit and step"
            )
        params = params or SamplingParams()
        given: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        encoded = [self.encode(prompt) for prompt in given]
        for ids in encoded:
            self._limits.check(ids, params)
        ids_of: list[int] = []
        deltas: defaultdict[tuple[int, int], list[Delta]] = defaultdict(list)
        try:
            for prompt in encoded:
                ids_of.append(self.submit(prompt, params))
            with Progress(len(encoded) * params.n, shown=progress) as bar:
                while self.has_work:
                    new = self.step()
                    bar.count(new)
                    for delta in new:
                        deltas[delta.request_id, delta.index].append(delta)
        except RunnerError as e:
            raise GenerationError(str(e)) from e
        finally:  # an error, or the user's interrupt, leaves nothing behind
            for request_id in ids_of:
                self.abort(request_id)
        return [
            Completion.of(deltas[request_id, index], prompt)
            for request_id, prompt in zip(ids_of, encoded, strict=True)
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
        self._limits.check(ids, params)
        constraints = [self._grammars.constraint(params) for _ in range(params.n)]
        with self._lock:
            request_id = next(self._requests)
            seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
            leader: SequenceState | None = None
            for index, constraint in enumerate(constraints):
                stream = self.tokenizer.stream() if self.tokenizer else None
                text = TextOutput(stream, params.stop_strings, params.min_tokens)
                candidate = SequenceState(
                    request_id, index, ids, params, seed, text, self.eos_ids, constraint, leader
                )
                leader = leader or candidate
                self._scheduler.add(candidate)
            self._submitted += 1
        return request_id

    def abort(self, request_id: int) -> None:
        """Drop a request; its blocks are free for the next step. One that is finished or unknown is no error."""
        with self._lock:
            self._scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        with self._lock:
            return self._scheduler.has_work

    @property
    def stats(self) -> EngineStats:
        """A snapshot."""
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
        """Compute what fits of the waiting prompts and give every sequence that is past its prompt a token.

        Returns one delta for each sequence that got a token or failed; none where there is nothing to do, or where
        all that was computed is the middle of prompts. A step that runs out of memory is tried again with less; a
        sequence that cannot be computed fails, and the others go on. Raises RunnerError where no step can be computed
        any more: a worker process is gone.
        """
        return self._core.step()


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
