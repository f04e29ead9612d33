"""Whether a run fits on a cluster and how long it takes, from the trace of one step."""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_ray.model.config import LlamaConfig
from llama_ray.training.config import ActivationCheckpointing, TrainConfig
from llama_ray.training.elastic import for_layout
from llama_ray.training.parallel.layout import GIB, Layout, choose_layout
from llama_ray.training.planning.memory_trace import Memory
from llama_ray.training.planning.step_trace import StepTrace, trace_step
from llama_ray.training.planning.traffic import MAX_GPUS, Collective, Links
from llama_ray.utils.fields import Limits, limits

RUNTIME_BYTES = int(1.5 * GIB)
"""GPU memory that is assumed to hold no tensors: the CUDA context, NCCL's channels, cuBLAS's workspaces."""

FRAGMENTATION = 0.05
"""Memory that the caching allocator is assumed to lose between tensors, as a share of the tensors' bytes."""

ASSUMED_MFU = 0.4
"""Model FLOPs utilisation of computing alone: torchtitan reports 0.39 for Llama 3.1 8B on 8 H100s."""

_RECOMPUTED: dict[ActivationCheckpointing, float] = {"none": 0.0, "selective": 0.5, "full": 1.0}
"""The share of a forward pass that activation checkpointing repeats."""


@dataclass(frozen=True, kw_only=True)
class Cluster(Links):
    """The GPUs of a run, one worker each, and the links between them. Values out of range raise ValueError."""

    gpus: int = field(metadata=limits(1, MAX_GPUS))
    gpu_memory_bytes: int = field(metadata=limits(1, 2**50))
    gpu_flops: float = field(default=989e12, metadata=limits(above=0))
    """Dense FLOP/s of one GPU in the run's precision, from the data sheet; by default those of an H100 in bf16."""

    def layout(self, model: LlamaConfig, config: TrainConfig) -> Layout:
        """Return the layout of a run on all GPUs. Raises ValueError if they cannot be divided as asked."""
        return choose_layout(
            model, config, self.gpus, memory_bytes=self.gpu_memory_bytes, node_size=self.gpus_per_node
        )


@dataclass(frozen=True)
class Plan:
    """The memory of one GPU at the peak of a step, and the time of a step.

    `mfu` is the share of the data sheet's rate that computing alone is assumed to reach.
    """

    model: LlamaConfig
    config: TrainConfig
    cluster: Cluster
    layout: Layout
    trace: StepTrace
    mfu: float

    @property
    def memory(self) -> Memory:
        """Bytes of tensors by kind at the peak of a step."""
        return self.trace.memory

    @property
    def needed_bytes(self) -> int:
        """Memory of one GPU: tensors, fragmentation and the runtime."""
        return int(sum(self.memory.values()) * (1 + FRAGMENTATION)) + RUNTIME_BYTES

    @property
    def fits(self) -> bool:
        """Whether `needed_bytes` fit into one GPU."""
        return self.needed_bytes <= self.cluster.gpu_memory_bytes

    @property
    def seq_len(self) -> int:
        """Tokens of one sequence."""
        return self.config.seq_len or self.model.max_seq_len

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.config.batch_size * self.micro_steps * self.layout.data_world * self.seq_len

    @property
    def micro_steps(self) -> int:
        """Micro-steps of a step: more than asked for where `auto` picks tensor parallelism, as in a run."""
        return for_layout(self.config, self.layout).gradient_accumulation_steps

    @property
    def compute_s(self) -> float:
        """Seconds of a step that a GPU computes at the assumed MFU, recomputed activations included."""
        flops = self.tokens_per_step * self.config.flops_per_token(self.model, self.seq_len)
        # Without gradients of the weights a step is two passes and not three.
        forward = 1 / 2 if self.config.lora else 1 / 3
        repeated = 1 + forward * _RECOMPUTED[self.config.activation_checkpointing]
        return flops * repeated / (self.cluster.gpus * self.cluster.gpu_flops * self.mfu)

    @property
    def overlapped_s(self) -> float:
        """Seconds of a step in which parameters and gradients are communicated while the GPU computes."""
        return self._micro_steps_s(tensor_parallel=False)

    @property
    def waited_s(self) -> float:
        """Seconds of a step in which the GPU waits for tensor-parallel activations and for the optimizer's traffic."""
        update_s = sum(self.cluster.seconds(*transfer) for transfer in self.trace.update.items())
        return self._micro_steps_s(tensor_parallel=True) + update_s

    @property
    def step_s(self) -> float:
        """Seconds of an optimizer step: the longer of computing and overlapped communication, plus waiting."""
        return max(self.compute_s, self.overlapped_s) + self.waited_s

    def days(self, tokens: float) -> float:
        """Return the days that training on `tokens` takes."""
        return tokens / self.tokens_per_step * self.step_s / 86400

    def _micro_steps_s(self, *, tensor_parallel: bool) -> float:
        """Return the seconds of communication in all micro-steps, within tensor-parallel groups or outside of them."""
        accumulated = self.micro_steps - 1
        return sum(
            times * self.cluster.seconds(collective, size)
            for traffic, times in ((self.trace.micro_step, accumulated), (self.trace.last_micro_step, 1))
            for collective, size in traffic.items()
            if self._is_tensor_parallel(collective) is tensor_parallel
        )

    def _is_tensor_parallel(self, collective: Collective) -> bool:
        return self.layout.tensor > 1 and collective.ranks == tuple(range(self.layout.tensor))


def make_plan(model: LlamaConfig, config: TrainConfig, cluster: Cluster, *, mfu: float = ASSUMED_MFU) -> Plan:
    """Trace the run that `config` asks for. Must be called outside of any process group.

    Raises ValueError if the GPUs cannot be divided as asked.
    """
    Limits(above=0, most=1).check("mfu", mfu, float)
    layout = cluster.layout(model, config)
    trace = trace_step(model, for_layout(config, layout), layout)
    return Plan(model, config, cluster, layout, trace, mfu)
