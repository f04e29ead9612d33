"""Compile the kernels that the engine launches for Hopper, where there is no GPU; print what is wrong with each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from on_gpu import compiled
from on_gpu.sweep_cases import Decode, Multiply, Prompts, Variant

from llama_ray.generation.backends.cuda.drawing import TRITON_OPS
from llama_ray.generation.backends.cuda.elementwise import rms_norm, rotate_and_store, swiglu
from llama_ray.generation.backends.cuda.one_row import multiply_row
from llama_ray.generation.backends.cuda.product import widen
from llama_ray.generation.backends.cuda.tiles import decode_tile, invariant_tile
from llama_ray.generation.sampling.draw import SamplingTensors

META, BF16 = torch.device("meta"), torch.bfloat16
HEADS = ((32, 4, 64), (32, 8, 128), (32, 32, 128), (8, 1, 256), (6, 2, 80))
"""(heads, kv_heads, head_dim)"""
WEIGHTS = ((2048, 5632), (4096, 4096), (22016, 4096), (4096, 11008))


def attention() -> Iterator[Callable[[], object]]:
    for heads in HEADS:
        for case in (Decode(1, 16384, *heads), Decode(256, 256, *heads), Prompts(8, 2048, *heads)):
            yield lambda case=case: case.launches(META, small=True)[0](case.current(132))
        invariant = Prompts(8, 2048, *heads)
        variant = Variant(decode_tile(heads[2], BF16))
        yield lambda case=invariant, variant=variant: case.launches(META, small=True)[0](variant)


def products() -> Iterator[Callable[[], object]]:
    for bits in (8, 4, 16):
        for shape in WEIGHTS:
            for rows in (1, 32, 64, 256) if bits < 16 else (256,):
                case = Multiply(rows, *shape, bits)
                weight, _ = case.weight(META)
                tiles = [Variant(invariant_tile(weight, BF16))]
                tiles += [case.current(132)] if bits < 16 else []
                for tile in tiles:
                    yield lambda case=case, tile=tile: case.launches(META, small=True)[0](tile)


def others() -> Iterator[Callable[[], object]]:
    x = torch.empty(8, 4096, dtype=BF16, device=META)
    yield lambda: rms_norm(x, x[0], 1e-6)
    yield lambda: swiglu(x)
    cos = torch.empty(8, 64, device=META)
    cache = torch.empty(4, 32, 8, 128, dtype=BF16, device=META)
    slots = torch.empty(8, dtype=torch.long, device=META)
    yield lambda: rotate_and_store(x[:, : 16 * 128], cos, cos, slots, cache, cache)
    for bits in (8, 4):
        weight, scales = Multiply(1, 4096, 4096, bits).weight(META)
        yield lambda weight=weight, scales=scales: widen(weight, scales, 4096, BF16)


def one_row() -> Iterator[Callable[[], object]]:
    for bits in (16, 8):
        for shape in WEIGHTS:
            weight, scales = Multiply(1, *shape, bits).weight(META)
            x, residual = (torch.empty(1, n, dtype=BF16, device=META) for n in reversed(shape))
            options = (
                {"norm": (x[0], 1e-6)},
                {"norm": (x[0], 1e-6), "gated": True},
                {"residual": residual},
            )
            for option in options:
                yield lambda w=weight, s=scales, x=x, option=option: multiply_row(x, w, s, **option)


def drawing() -> Iterator[Callable[[], object]]:
    column = torch.empty(8, 1, device=META)
    boolean, double, keys = column.bool(), column.double(), column.long()
    for width, vocab_size in ((64, 32000), (512, 32000), (1024, 32000), (1024, 128256), (20, 20)):
        logits = torch.empty(8, vocab_size, device=META)
        outside = torch.empty(8, width, dtype=torch.bool, device=META)
        for log_min_p in (None, column):
            tensors = SamplingTensors(width, column, outside, boolean, double, log_min_p)
            yield lambda x=logits, tensors=tensors: TRITON_OPS.draw_filtered(x, tensors, keys)


GROUPS = {
    "attention": attention,
    "products": products,
    "one_row": one_row,
    "drawing": drawing,
    "others": others,
}


def main() -> None:
    compiled.only_compile()
    seen = set()
    for launch in GROUPS[sys.argv[1]]():
        for used in compiled.resources(launch):
            seen.add(used.name)
            if problem := used.problem():
                print(f"{used}: {problem}")
    print("compiled", *sorted(seen))


if __name__ == "__main__":
    main()
