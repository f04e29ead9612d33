"""What workers send one another in a step, collective by collective, and how long their links take for it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.distributed.tensor import DTensor

from llama_ray.utils.torch_private import TorchDispatchMode, collective_call


class Collective(NamedTuple):
    """Who exchanges what: `operation` is all_gather, reduce_scatter, all_reduce or broadcast, among `ranks`."""

    operation: str
    ranks: tuple[int, ...]


Traffic = Mapping[Collective, float]
"""Bytes of the whole tensor, not of a worker's share, added up over all calls."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """What joins the GPUs; bytes/s of one GPU in each direction, from the data sheets."""

    gpus_per_node: int = 8
    node_bandwidth: float = 450e9
    """NVLink 4, as an H100 or H200 has it: 900 GB/s, counted in both directions."""
    network_bandwidth: float = 50e9
    """400 Gb/s a GPU."""
    reached: float = 0.8
    """Share of both that collectives reach."""

    def seconds(self, collective: Collective, size: float) -> float:
        """Of a ring: what one worker receives of `size` bytes, by its slowest link; latency is left out.

        A group with several members on a node has as many network adapters to take it in.
        """
        ranks = collective.ranks
        nodes = Counter(rank // self.gpus_per_node for rank in ranks)
        passes = 2 if collective.operation == "all_reduce" else 1
        inside = (len(ranks) - 1) / len(ranks) / self.node_bandwidth if len(ranks) > len(nodes) else 0.0
        adapters = min(nodes.values())
        between = (len(nodes) - 1) / len(nodes) / (adapters * self.network_bandwidth)
        return passes * size * max(inside, between) / self.reached


class TrafficTrace(TorchDispatchMode):
    """Inside, every collective of this worker is counted; `parts` has the traffic of each part of a step."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._part = ""
        self.parts: defaultdict[str, Counter[Collective]] = defaultdict(Counter)

    def begin(self, part: str) -> None:
        """From now on collectives count under this name."""
        self._part = part

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then count it if workers talk in it."""
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes again as operations on this rank's shards
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        call = collective_call(func, args, kwargs, result)
        if call is not None and len(call.ranks) > 1:
            self.parts[self._part][Collective(_operation(call.name), call.ranks)] += call.size
        return result


def _operation(op: str) -> str:
    name = op.split("::")[1].split(".")[0].replace("_", "")
    for operation in ("all_gather", "reduce_scatter", "all_reduce", "broadcast"):
        if operation.replace("_", "") in name:
            return operation
    raise AssertionError(f"a training step has no {name}")
