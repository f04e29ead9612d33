"""What `sweep.py` measures: kernels on shapes of real models, with the launch parameters to choose from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ray.generation.backends.backend import BLOCK_SIZE
from llama_ray.generation.backends.cuda.attention import attend
from llama_ray.generation.backends.cuda.one_row import RowTile, multiply_row
from llama_ray.generation.backends.cuda.product import multiply, pack, widen
from llama_ray.generation.backends.cuda.tiles import (
    ROWS,
    AttentionTile,
    ProductTile,
    decode_tile,
    product_tile,
    prompt_tile,
    splits,
)
from llama_ray.utils.integers import ceil_div

BF16 = torch.bfloat16
ROTATED_BYTES = 2**28
"""Launches alternate between copies of this size together, so that none finds its input in the L2 cache."""


class Variant(NamedTuple):
    """Launch parameters."""

    tile: AttentionTile | ProductTile
    splits: int = 1

    def __str__(self) -> str:
        parts = [f"{name} {value}" for name, value in self.tile._asdict().items()]
        return ", ".join([*parts, f"splits {self.splits}"] if self.splits > 1 else parts)


class Case(ABC):
    """A kernel with inputs of one shape."""

    unit = "GB/s"
    heads: tuple[int, int]

    @abstractmethod
    def amount(self) -> float:
        """Return the bytes that a launch reads or the operations that it computes."""

    @abstractmethod
    def current(self, processors: int) -> Variant:
        """Return the parameters that the engine uses."""

    @abstractmethod
    def others(self, processors: int) -> Iterator[Variant]:
        """Yield parameters to try."""

    @abstractmethod
    def launches(self, device: torch.device, *, small: bool = False) -> list[Callable[[Variant], Tensor]]:
        """Return a launch for each copy of the inputs; `small` ones suffice to compile for."""

    def references(self, device: torch.device) -> dict[str, Callable[[], Tensor]]:
        """Return other ways to compute the same, by name."""
        return {}

    def copies(self, nbytes: float, small: bool) -> int:
        """Return how many copies of inputs of `nbytes` are needed."""
        return 1 if small else min(64, ceil_div(ROTATED_BYTES, int(nbytes)) + 1)


@dataclass(frozen=True)
class Decode(Case):
    """One query of each sequence."""

    sequences: int
    context: int
    heads: int
    kv_heads: int
    dim: int

    def __str__(self) -> str:
        shape = f"{self.heads}/{self.kv_heads} heads of {self.dim}"
        return f"decode {self.sequences} x {self.context}, {shape}"

    def amount(self) -> float:
        """See `Case`."""
        return 4.0 * self.sequences * self.context * self.kv_heads * self.dim

    def current(self, processors: int) -> Variant:
        """See `Case`."""
        parts = splits(self.sequences * self.kv_heads, self.context, processors)
        return Variant(decode_tile(self.dim, BF16), parts)

    def others(self, processors: int) -> Iterator[Variant]:
        """See `Case`."""
        units = self.sequences * self.kv_heads
        counts = {max(1, min(64, processors * n // units, self.context // 128)) for n in (1, 2, 3, 4)}
        # One kernel serves all splits: the first round compiles it, so that the others find it.
        tiles = product((64, 128, 32), (4, 8), (3, 4, 2))
        for parts, (keys, warps, stages) in product(sorted(counts), tiles):
            yield Variant(AttentionTile(ROWS, keys, warps, stages), parts)

    def launches(self, device: torch.device, *, small: bool = False) -> list[Callable[[Variant], Tensor]]:
        """See `Case`."""
        width = ceil_div(self.context, BLOCK_SIZE)
        blocks = 1 if small else self.sequences * width
        query = torch.randn(self.sequences, self.heads, self.dim, device=device, dtype=BF16)
        start = torch.arange(self.sequences + 1, dtype=torch.int32, device=device)
        context = torch.full((self.sequences,), self.context, dtype=torch.int32, device=device)
        table = torch.randperm(self.sequences * width, device=device).int().view(self.sequences, width)
        arrived = torch.zeros(4096, dtype=torch.int32, device=device)

        def launch(keys: Tensor, values: Tensor) -> Callable[[Variant], Tensor]:
            def with_parameters(variant: Variant) -> Tensor:
                return attend(
                    query,
                    keys,
                    values,
                    start,
                    context,
                    table,
                    variant.tile,
                    splits=variant.splits,
                    arrived=arrived,
                )

            return with_parameters

        shape = (2, blocks, BLOCK_SIZE, self.kv_heads, self.dim)
        number = self.copies(self.amount(), small)
        return [launch(*torch.randn(shape, device=device, dtype=BF16)) for _ in range(number)]


@dataclass(frozen=True)
class Prompts(Case):
    """Whole prompts."""

    sequences: int
    length: int
    heads: int
    kv_heads: int
    dim: int
    unit = "TFLOP/s"

    def __str__(self) -> str:
        shape = f"{self.heads}/{self.kv_heads} heads of {self.dim}"
        return f"prompts {self.sequences} x {self.length}, {shape}"

    def amount(self) -> float:
        """See `Case`."""
        return 2.0 * self.sequences * self.length**2 * self.heads * self.dim

    def current(self, processors: int) -> Variant:
        """See `Case`."""
        return Variant(prompt_tile(self.dim, BF16))

    def others(self, processors: int) -> Iterator[Variant]:
        """See `Case`."""
        for rows, warps, keys, stages in product((128, 64), (8, 4), (64, 128, 32), (3, 2)):
            if rows * self.dim < 128 * 128 or warps == 8:
                yield Variant(AttentionTile(rows, keys, warps, stages))

    def launches(self, device: torch.device, *, small: bool = False) -> list[Callable[[Variant], Tensor]]:
        """See `Case`."""
        width = ceil_div(self.length, BLOCK_SIZE)
        blocks = 1 if small else self.sequences * width
        tokens = self.sequences * self.length
        query = torch.randn(1 if small else tokens, self.heads, self.dim, device=device, dtype=BF16)
        query = query.expand(tokens, -1, -1)
        start = torch.arange(self.sequences + 1, dtype=torch.int32, device=device) * self.length
        context = torch.full((self.sequences,), self.length, dtype=torch.int32, device=device)
        table = torch.randperm(self.sequences * width, device=device).int().view(self.sequences, width)
        shape = (2, blocks, BLOCK_SIZE, self.kv_heads, self.dim)
        keys, values = torch.randn(shape, device=device, dtype=BF16)
        return [lambda variant: attend(query, keys, values, start, context, table, variant.tile)]

    def references(self, device: torch.device) -> dict[str, Callable[[], Tensor]]:
        """See `Case`."""
        shapes = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (
            torch.randn(self.sequences, heads, self.length, self.dim, device=device, dtype=BF16)
            for heads in shapes
        )
        return {"torch": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)}


@dataclass(frozen=True)
class Multiply(Case):
    """A product with a weight of `bits`."""

    rows: int
    outputs: int
    inputs: int
    bits: int

    def __str__(self) -> str:
        kind = {16: "bf16", 8: "int8", 4: "int4"}[self.bits]
        return f"{kind} product, {self.rows} rows x [{self.outputs}, {self.inputs}]"

    @property
    def unit(self) -> str:  # type: ignore[override]
        """Few rows are bound by memory."""
        return "GB/s" if self.rows <= 64 else "TFLOP/s"

    def amount(self) -> float:
        """See `Case`."""
        if self.unit == "GB/s":
            return self.outputs * self.inputs * self.bits / 8
        return 2.0 * self.rows * self.outputs * self.inputs

    def weight(self, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
        """Return a random weight in the layout of `multiply`, and its scales."""
        shape = (self.outputs, self.inputs)
        if self.bits == 16:
            return torch.randn(shape, device=device, dtype=BF16) * self.inputs**-0.5, None
        top = 127 if self.bits == 8 else 7
        values = torch.randint(-top, top + 1, shape, device=device, dtype=torch.int8)
        if self.bits == 8:
            return values, torch.rand(self.outputs, device=device)
        return pack(values), torch.rand(ceil_div(self.inputs, 128) * 2, self.outputs, device=device).to(BF16)

    def current(self, processors: int) -> Variant:
        """See `Case`."""
        weight, _ = self.weight("meta")
        return Variant(product_tile(weight, self.rows, BF16, processors))

    def others(self, processors: int) -> Iterator[Variant]:
        """See `Case`."""
        rows = next((n for n in (16, 32, 64) if self.rows <= n), 128)
        step = 128 if self.bits < 16 else 64
        if rows < 128:
            tiles = product((64, 32, 128), (2, 4), (4, 6, 3), (1, 2, 4, 8))
            for outputs, warps, stages, splits in tiles:
                programs = ceil_div(self.outputs, outputs) * splits / processors
                if 0.8 < programs <= 12:
                    yield Variant(ProductTile(rows, outputs, step, warps, stages, splits))
        else:
            for rows, outputs, warps, stages in product((128, 64), (128, 64), (8, 4), (3, 4)):
                yield Variant(ProductTile(rows, outputs, step, warps, stages))

    def launches(self, device: torch.device, *, small: bool = False) -> list[Callable[[Variant], Tensor]]:
        """See `Case`."""
        x = torch.randn(self.rows, self.inputs, device=device, dtype=BF16)
        arrived = torch.zeros(self.outputs, dtype=torch.int32, device=device)

        def launch(weight: Tensor, scales: Tensor | None) -> Callable[[Variant], Tensor]:
            return lambda variant: multiply(x, weight, scales, variant.tile, arrived)

        nbytes = self.outputs * self.inputs * self.bits / 8
        return [launch(*self.weight(device)) for _ in range(self.copies(nbytes, small))]

    def references(self, device: torch.device) -> dict[str, Callable[[], Tensor]]:
        """See `Case`."""
        number = self.copies(2.0 * self.outputs * self.inputs, False)
        shape = (self.outputs, self.inputs)
        weights = [torch.randn(shape, device=device, dtype=BF16) for _ in range(number)]
        x = torch.randn(self.rows, self.inputs, device=device, dtype=BF16)
        at = iter(range(10**9))
        found = {"cuBLAS with a bf16 weight": lambda: F.linear(x, weights[next(at) % number])}
        if self.rows == 1 and self.bits > 4:
            own = [self.weight(device) for _ in weights]
            for outputs, step, warps in product((2, 4, 8), (512, 1024), (4, 8)):
                row = RowTile(outputs, step, warps)
                found[f"one row: {row}"] = lambda row=row: multiply_row(x, *own[next(at) % number], tile=row)
        if self.bits < 16 and self.rows > 64:
            weight, scales = self.weight(device)
            found["widened, then cuBLAS"] = lambda: F.linear(x, widen(weight, scales, self.inputs, BF16))
        return found


MODELS = ((32, 4, 64), (32, 8, 128), (32, 32, 128))
"""(heads, kv_heads, head_dim) of 1.1B, an 8B and a 7B."""


def decode_cases() -> list[Case]:
    """One long context, some middling ones, many short ones."""
    return [Decode(n, length, *m) for m in MODELS for n, length in ((1, 16384), (32, 2048), (256, 256))]


def prompt_cases() -> list[Case]:
    """Prompts of 2048 tokens."""
    return [Prompts(8, 2048, *model) for model in (MODELS[0], MODELS[1])]


def product_cases() -> list[Case]:
    """The smallest and the largest weights of 1.1B and 7B. Plain ones are multiplied by cuBLAS, but for invariance."""
    shapes = ((4096, 4096), (22016, 4096), (4096, 11008), (2048, 5632), (11264, 2048))
    cases = [(rows, *shape, bits) for rows in (1, 16, 32, 256, 1024) for bits in (8, 4) for shape in shapes]
    return [Multiply(*case) for case in [*cases, (1, *shapes[0], 16), (256, *shapes[0], 16)]]


CASES: dict[str, Callable[[], list[Case]]] = {
    "decode": decode_cases,
    "prompts": prompt_cases,
    "products": product_cases,
}
