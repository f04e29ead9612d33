"""What workers send each other in a step, collective by collective, and how long that takes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch.distributed.tensor import DTensor

from llama_ray.utils.fields import check_fields, limits
from llama_ray.utils.torch_private import TorchDispatchMode, collective_call

MAX_GPUS = 16384
"""GPUs of the largest cluster to plan for: Llama 3 405B was trained on as many (arXiv:2407.21783)."""

_OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce", "broadcast")


class Collective(NamedTuple):
    """An operation (all_gather, reduce_scatter, all_reduce or broadcast) and the ranks that take part in it."""

    operation: str
    ranks: tuple[int, ...]


Traffic = Mapping[Collective, float]
"""Bytes by collective, summed over its calls; they are those of the whole tensor, not of a worker's shard."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """The links between GPUs. Bandwidths are bytes/s of one GPU in each direction, from the data sheets.

    Values out of range raise ValueError.
    """

    gpus_per_node: int = field(default=8, metadata=limits(1, MAX_GPUS))
    node_bandwidth: float = field(default=450e9, metadata=limits(above=0))
    """Of NVLink 4, as in an H100 or H200, whose 900 GB/s count both directions."""
    network_bandwidth: float = field(default=50e9, metadata=limits(above=0))
    """Of an adapter with 400 Gb/s per GPU."""
    reached: float = field(default=0.8, metadata=limits(above=0, most=1))
    """Share of both bandwidths that collectives reach."""

    def __post_init__(self) -> None:
        check_fields(self)

    def seconds(self, collective: Collective, size: float) -> float:
        """Return the seconds that a ring takes for `size` bytes, by its slowest link; latency is left out.

        A group with several members on a node uses the network adapters of all of them.
        """
        ranks = collective.ranks
        nodes = Counter(rank // self.gpus_per_node for rank in ranks)
        passes = 2 if collective.operation == "all_reduce" else 1
        within = (len(ranks) - 1) / len(ranks) / self.node_bandwidth if len(ranks) > len(nodes) else 0.0
        adapters = min(nodes.values())
        between = (len(nodes) - 1) / len(nodes) / (adapters * self.network_bandwidth)
        return passes * size * max(within, between) / self.reached


class TrafficTrace(TorchDispatchMode):
    """Context in which each collective of this worker counts; `parts` has the traffic of each part."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts: defaultdict[str, Counter[Collective]] = defaultdict(Counter)
        """Traffic of each part that `begin` named; "" is the part before the first of them."""
        self._part = ""

    def begin(self, part: str) -> None:
        """Begin the part of the code whose traffic is to be `parts[part]`."""
        self._part = part

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then count it if it is a collective."""
        if any(issubclass(t, DTensor) for t in types):
            # DTensor repeats the operation on this rank's shards.
            return NotImplemented
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        call = collective_call(func, args, kwargs, result)
        if call is not None and len(call.ranks) > 1:
            self.parts[self._part][Collective(_operation(call.name), call.ranks)] += call.size
        return result


def _operation(name: str) -> str:
    """Return the operation of `_OPERATIONS` that torch calls, for example, `c10d::_allgather_base_`."""
    plain = name.split("::")[1].split(".")[0].replace("_", "")
    for operation in _OPERATIONS:
        if operation.replace("_", "") in plain:
            return operation
    raise AssertionError(
        f"{name} is a collective of a training step; it must be one of {', '.join(_OPERATIONS)}"
    )
