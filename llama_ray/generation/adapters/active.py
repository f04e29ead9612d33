"""The adapters of the rows that are being computed: a runner names them, and the model's products add them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from llama_ray.generation.adapters.weights import AdapterWeights


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that is laid out for the kernels of one backend; requests hold it until they end."""

    digest: bytes
    """See `AdapterWeights`."""
    nbytes: int


@dataclass(frozen=True)
class Segment:
    """The rows of a step that one adapter applies to."""

    adapter: Adapter
    rows: list[int]


class StepAdapters(Protocol):
    """The adapters of one step, on the device."""

    def add(self, layer: int, product: str, x: Tensor, y: Tensor) -> Tensor:
        """Return `y` [..., out] plus what each row's adapter adds to a product of `x` [..., in]; y may be changed."""


class AdapterKernels(Protocol):
    """How a backend computes adapters."""

    def pack(self, weights: AdapterWeights) -> Adapter:
        """Lay out an adapter that fits the model; may be called from any thread."""

    def begin(self, segments: Sequence[Segment]) -> StepAdapters:
        """Prepare the adapters of a step."""


class ActiveAdapters:
    """Holds the adapters of the step that is being computed, for all products of a model."""

    def __init__(self) -> None:
        self.kernels: AdapterKernels | None = None
        """None until the model may have adapters."""
        self.step: StepAdapters | None = None
        """None while a step without adapters is computed."""

    @contextmanager
    def rows(self, spans: Sequence[tuple[Adapter | None, int]]) -> Iterator[None]:
        """Apply adapters while a step is computed: each span is an adapter, or None, and its number of rows."""
        segments = _segments(spans) if self.kernels else []
        if not segments or self.kernels is None:
            yield
            return
        self.step = self.kernels.begin(segments)
        try:
            yield
        finally:
            self.step = None


def _segments(spans: Sequence[tuple[Adapter | None, int]]) -> list[Segment]:
    rows: dict[Adapter, list[int]] = {}
    start = 0
    for adapter, count in spans:
        if adapter is not None:
            rows.setdefault(adapter, []).extend(range(start, start + count))
        start += count
    return [Segment(adapter, own) for adapter, own in rows.items()]
