"""One model over several ranks: each holds a share of every layer's heads and columns, and of the vocabulary.

Megatron's split (Shoeybi et al. 2019, arXiv:1909.08053). Queries, keys, values, gate and up are cut by their outputs,
so that heads and columns stay whole; o_proj and down_proj by their inputs, and what the ranks get from those two is
added up, twice a layer. The head is cut by tokens of the vocabulary and gathered on rank 0, for the rows that are
wanted. The embedding is whole on every rank: a lookup then needs nobody else, for at most 2 GiB (Llama 3 70B).

Steps run eagerly: collectives inside CUDA graphs are not attempted.
"""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_ray.generation.batch import StepBatch
from llama_ray.generation.kv_cache import KVCache
from llama_ray.generation.runner import Runner, RunnerError, StepLogits
from llama_ray.generation.scheduler import Plan
from llama_ray.model.checkpoint import Part
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama

if TYPE_CHECKING:
    from llama_ray.generation.workers import Workers

_log = logging.getLogger(__name__)

TIMEOUT_S = 300.0
"""For the other ranks to take part in a step; a first one may compile kernels."""

_CUT = {
    "q_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 0, "up_proj": 0, "lm_head": 0, "o_proj": 1, "down_proj": 1
}  # fmt: skip
"""The dimension of a weight [outputs, inputs] that is divided; all others are whole on every rank."""


def check_ranks(config: LlamaConfig, ranks: int, device: torch.device) -> None:
    """Raise ValueError where a model cannot be divided between so many ranks, or there are no GPUs for them."""
    if ranks < 1:
        raise ValueError(f"tensor_parallel is {ranks}; it must be at least 1")
    for name in ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % ranks:
            raise ValueError(
                f"tensor_parallel is {ranks}, which does not divide the model's {name} of {getattr(config, name)}; "
                f"this model divides by {_divisors(config)}"
            )
    if device.type == "cuda":
        if device.index:
            raise ValueError(
                f"device is {device}, but tensor_parallel takes GPUs 0 to {ranks - 1}; give device cuda and choose "
                "GPUs by CUDA_VISIBLE_DEVICES"
            )
        if ranks > torch.cuda.device_count():
            raise ValueError(
                f"tensor_parallel is {ranks}, and {torch.cuda.device_count()} GPUs are visible; lower it, or make "
                "more of them visible"
            )


def rank_config(config: LlamaConfig, ranks: int) -> LlamaConfig:
    """The shape that a rank's keys and values have."""
    return dataclasses.replace(
        config, num_heads=config.num_heads // ranks, num_kv_heads=config.num_kv_heads // ranks
    )


def rank_device(kind: str, rank: int) -> torch.device:
    """Where a rank computes: each on its own GPU, or all on the CPU."""
    return torch.device(kind, rank) if kind == "cuda" else torch.device(kind)


def share(rank: int, ranks: int) -> Part:
    """What a rank keeps of each weight, for `load_model`."""

    def part(name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        kept = [slice(0, n) for n in shape]
        dim = _CUT.get(name.split(".")[-2])
        if dim is not None:
            n = shape[dim] // ranks
            kept[dim] = slice(rank * n, (rank + 1) * n)
        return tuple(kept)

    return part


def cut_tied_head(model: Llama, rank: int, ranks: int) -> None:
    """Where the head reads the embedding, let it read this rank's rows of it; they take no memory of their own."""
    if model.config.tie_embeddings:
        rows = model.embed_tokens.weight.detach().chunk(ranks)[rank]
        del model.lm_head.weight
        model.lm_head.register_buffer("weight", rows, persistent=False)
        model.lm_head.out_features = len(rows)


class Ranks:
    """The collectives of one rank: NCCL between GPUs, gloo on the loopback device between CPU processes.

    The group belongs to this object alone, beside torch's default group and other engines of the process. Making
    one waits for the others; they meet in `directory`.
    """

    def __init__(self, directory: str | Path, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size = rank, size
        self.sums = self.gathers = 0
        """So many of each since they were last set to 0."""
        store = dist.FileStore(f"{directory}/store", size)  # type: ignore[attr-defined]
        try:
            self._group: Any = (_nccl if device.type == "cuda" else _gloo)(store, rank, size)
        except RuntimeError as e:
            raise RunnerError(f"the ranks did not meet ({_first_line(e)})") from e
        self.sum(torch.zeros(1, device=device))  # NCCL connects with the first one

    def sum(self, part: Tensor) -> Tensor:
        """One tensor of each rank -> their sum on every rank, the same to the bit.

        Parts are gathered and added in the order of the ranks, in fp32, and rounded once. A ring or a tree would
        move less with four ranks and more (half as much with four), but it adds in an order that depends on where
        an element lies, and so on how many tokens share the step.
        """
        parts = part.new_empty((self.size, *part.shape))
        self._complete(self._group._allgather_base, _bytes(parts), _bytes(part))
        self.sums += 1
        total = parts[0].to(torch.promote_types(part.dtype, torch.float32))
        for other in parts[1:]:
            total += other
        return total.to(part.dtype)

    def gather(self, part: Tensor) -> Tensor:
        """[rows, n] of each rank -> [rows, ranks * n] on rank 0; the others get their own part back."""
        if len(part):
            parts = [torch.empty_like(part) for _ in range(self.size)] if self.rank == 0 else []
            options = dist.GatherOptions()
            options.rootRank = 0
            self._complete(self._group.gather, [parts] if parts else [], [part.contiguous()], options)
            self.gathers += 1
            return torch.cat(parts, -1) if parts else part
        return part.new_empty((0, part.shape[-1] * self.size))

    def abort(self) -> None:
        """End whatever is under way, from any thread: another rank is gone, and NCCL would wait for it for ever."""
        self._group.abort()

    def _complete(self, collective: Callable[..., Any], *args: Any) -> None:
        try:
            collective(*args).wait()
        except RuntimeError as e:  # dist.DistError is one, but gloo raises this itself
            raise RunnerError(f"the ranks lost contact ({_first_line(e)})") from e


class RankRunner(Runner):
    """What `Runner` does, for one rank's share of the model and of the cache, in step with the other ranks."""

    def __init__(self, model: Llama, cache: KVCache, ranks: Ranks) -> None:
        super().__init__(model, cache)
        self.ranks = ranks
        # Whatever multiplies by these weights by now, quantised or not, its result is one rank's part.
        for name, module in model.named_modules():
            if name.endswith(("o_proj", "down_proj")):
                module.register_forward_hook(lambda _module, _args, part: ranks.sum(part))
        model.lm_head.register_forward_hook(lambda _module, _args, part: ranks.gather(part))

    @torch.inference_mode()
    def compute(self, batch: StepBatch, copies: list[tuple[int, int]]) -> Tensor | Exception:
        """Copy blocks, then run a batch that lies in the host's memory -> its logits, whole on rank 0.

        An error is returned, not raised, once this rank has taken part in what the others still wait for: all are
        ready for the next step then. RunnerError is raised where the ranks have lost contact.
        """
        self.ranks.sums = self.ranks.gathers = 0
        try:
            for source, target in copies:
                self.cache.copy_block(source, target)
            device = self.model.embed_tokens.weight.device
            return super().forward(_mapped(batch, lambda tensor: tensor.to(device)))
        except RunnerError:
            raise
        except Exception as e:
            traceback.clear_frames(
                e.__traceback__
            )  # they hold the step's tensors, and memory may be what lacks
            failure = e
        self._make_up(len(batch.tokens), len(batch.logit_rows))
        return failure

    def _make_up(self, tokens: int, rows: int) -> None:
        weight, config = self.model.embed_tokens.weight, self.model.config
        for _ in range(2 * config.num_layers - self.ranks.sums):
            self.ranks.sum(weight.new_zeros((1, tokens, config.hidden_size)))
        if not self.ranks.gathers:
            self.ranks.gather(weight.new_zeros((rows, config.vocab_size // self.ranks.size)))


class TensorParallelRunner(RankRunner):
    """The runner of rank 0, whom the engine asks: tells the workers what each step is and computes its own share.

    Raises RunnerError once a worker is gone, or a step was interrupted, after which ranks would not agree on which
    step they are in; the workers are ended then.
    """

    def __init__(self, model: Llama, cache: KVCache, ranks: Ranks, workers: Workers) -> None:
        super().__init__(model, cache, ranks)
        self.device = torch.device("cpu")  # batches are made for all ranks; each takes them to its own device
        self._workers = workers
        self._copies: list[tuple[int, int]] = []

    def run(self, plan: Plan) -> StepLogits:
        """See `Runner`."""
        self._copies += plan.copies
        return super().run(Plan(plan.chunks))

    def forward(self, batch: StepBatch) -> Tensor:
        """See `Runner`."""
        workers = self._workers
        copies, self._copies = self._copies, []
        try:
            workers.ask("step", _mapped(batch, Tensor.numpy), copies)
            logits = self.compute(batch, copies)
            answers = workers.answers(TIMEOUT_S)
        except RunnerError as e:
            raise workers.lost(str(e)) from e
        except BaseException:
            workers.close("a step was interrupted, which ended the engine's workers")
            raise
        for failure in (logits, *answers):
            if isinstance(failure, Exception):
                raise failure
        assert isinstance(logits, Tensor)
        return logits


def from_host(arrays: StepBatch) -> StepBatch:
    """A batch as it comes from rank 0, as tensors."""
    return _mapped(arrays, torch.from_numpy)


def _nccl(store: Any, rank: int, size: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=TIMEOUT_S)
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _gloo(store: Any, rank: int, size: int) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=TIMEOUT_S)
    return dist.ProcessGroupGloo(store, rank, size, options)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _mapped(batch: StepBatch, function: Callable[[Any], Any]) -> StepBatch:
    return StepBatch(**{f.name: function(getattr(batch, f.name)) for f in dataclasses.fields(batch)})


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _divisors(config: LlamaConfig) -> str:
    sizes = (config.num_heads, config.num_kv_heads, config.intermediate_size, config.vocab_size)
    *most, last = [str(n) for n in range(1, config.num_kv_heads + 1) if not any(size % n for size in sizes)]
    return f"{', '.join(most)} and {last}" if most else f"{last} only"
