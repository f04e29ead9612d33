"""The Triton kernels of products with plain, int8 or int4 weights."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _unpack(packed, like, FAST: tl.constexpr):
    """Return the int4 values of the low and of the high halves of bytes, in the dtype of `like`."""
    if FAST:
        # 0x4300 + n is 128 + n in bfloat16, of which 136 is subtracted: 11 instructions for eight numbers.
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, one, bias;
            and.b32 low, $4, 0x0F0F0F0F;
            shr.b32 high, $4, 4;
            and.b32 high, high, 0x0F0F0F0F;
            mov.b32 one, 0x3F803F80;
            mov.b32 bias, 0xC308C308;
            prmt.b32 $0, low, 0x43434343, 0x4140;
            prmt.b32 $1, low, 0x43434343, 0x4342;
            prmt.b32 $2, high, 0x43434343, 0x4140;
            prmt.b32 $3, high, 0x43434343, 0x4342;
            fma.rn.bf16x2 $0, $0, one, bias;
            fma.rn.bf16x2 $1, $1, one, bias;
            fma.rn.bf16x2 $2, $2, one, bias;
            fma.rn.bf16x2 $3, $3, one, bias;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((packed & 15).to(tl.int8) - 8).to(like.dtype)
        high = ((packed >> 4).to(tl.int8) - 8).to(like.dtype)
    return low, high


@triton.jit(do_not_specialize=["rows"])
def multiply_kernel(
    out,
    x,
    weight,
    scales,
    part_sums,
    arrived,
    rows,
    outputs,
    inputs,
    x_stride,
    weight_stride,
    BITS: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute a tile of the product, or one of SPLITS parts of its inputs; the program that ends last adds them up."""
    # Weights are the left factor: tensor cores need 16 rows of it, but only 8 columns of the right factor.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, OUT)
    channel = tl.program_id(1) * OUT + column
    exists = (row < rows)[None, :]
    x_rows = x + row.to(tl.int64)[None, :] * x_stride
    known = tl.minimum(channel, outputs - 1)
    weights = weight + known.to(tl.int64)[:, None] * weight_stride
    begin = 0
    end = inputs
    if SPLITS > 1:
        split = tl.program_id(2)
        length = tl.cdiv(tl.cdiv(inputs, STEP), SPLITS) * STEP
        begin = split * length
        end = tl.minimum(inputs, begin + length)
    sums = tl.zeros([OUT, ROWS], tl.float32)
    if BITS == 4:
        HALF: tl.constexpr = STEP // 2
        k = tl.arange(0, HALF)
        group = scales + known
        # The scales of a step are loaded while the step before is computed.
        scale_at = group + tl.minimum(begin, inputs - 1) // STEP * 2 * outputs
        first_scale = tl.load(scale_at)
        second_scale = tl.load(scale_at + outputs)
        for start in range(begin, end, STEP):
            packed = tl.load(weights + (start // 2 + k)[None, :])
            at = start + k
            if EVEN:
                first = tl.load(x_rows + at[:, None], mask=exists, other=0.0)
                second = tl.load(x_rows + (at + HALF)[:, None], mask=exists, other=0.0)
            else:
                first = tl.load(x_rows + at[:, None], mask=exists & (at < inputs)[:, None], other=0.0)
                mask = exists & (at + HALF < inputs)[:, None]
                second = tl.load(x_rows + (at + HALF)[:, None], mask=mask, other=0.0)
            low, high = _unpack(packed, first, FAST)
            product = tl.dot(low, first, input_precision=PRECISION)
            sums += product * first_scale.to(tl.float32)[:, None]
            product = tl.dot(high, second, input_precision=PRECISION)
            sums += product * second_scale.to(tl.float32)[:, None]
            scale_at = group + tl.minimum(start + STEP, inputs - 1) // STEP * 2 * outputs
            first_scale = tl.load(scale_at)
            second_scale = tl.load(scale_at + outputs)
    else:
        k = tl.arange(0, STEP)
        for start in range(begin, end, STEP):
            at = start + k
            if EVEN:
                w = tl.load(weights + at[None, :])
                part = tl.load(x_rows + at[:, None], mask=exists, other=0.0)
            else:
                w = tl.load(weights + at[None, :], mask=(at < inputs)[None, :], other=0)
                part = tl.load(x_rows + at[:, None], mask=exists & (at < inputs)[:, None], other=0.0)
            sums = tl.dot(w.to(part.dtype), part, sums, input_precision=PRECISION)
    last = True
    if SPLITS > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        parts = part_sums + tile.to(tl.int64) * (SPLITS * ROWS * OUT)
        parts += tl.arange(0, ROWS)[None, :] * OUT + column[:, None]
        tl.store(parts + split * (ROWS * OUT), sums)
        # The barrier orders the stores of all threads before the addition, which orders them before what the program
        # that arrives last loads.
        tl.debug_barrier()
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.debug_barrier()
            # The next product counts from 0 again.
            tl.store(arrived + tile, 0)
            # Other processors wrote the parts: read them from the L2 cache, which all share.
            sums = tl.load(parts, cache_modifier=".cg")
            for other in tl.static_range(1, SPLITS):
                sums += tl.load(parts + other * (ROWS * OUT), cache_modifier=".cg")
    if last:
        if BITS == 8:
            sums *= tl.load(scales + known)[:, None]
        tl.store(
            out + row.to(tl.int64)[None, :] * outputs + channel[:, None],
            sums.to(out.dtype.element_ty),
            mask=exists & (channel < outputs)[:, None],
        )


@triton.jit
def widen_kernel(
    out,
    weight,
    scales,
    outputs,
    inputs,
    weight_stride,
    BITS: tl.constexpr,
    OUT: tl.constexpr,
    STEP: tl.constexpr,
):
    """Write a tile of the rounded numbers that a quantised weight represents."""
    channel = tl.program_id(1) * OUT + tl.arange(0, OUT)
    known = tl.minimum(channel, outputs - 1)
    start = tl.program_id(0) * STEP
    rows = known.to(tl.int64)[:, None]
    if BITS == 8:
        at = start + tl.arange(0, STEP)
        exists = (channel < outputs)[:, None] & (at < inputs)[None, :]
        w = tl.load(weight + rows * weight_stride + at[None, :], mask=exists, other=0)
        wide = w.to(tl.float32) * tl.load(scales + known)[:, None]
        tl.store(out + rows * inputs + at[None, :], wide.to(out.dtype.element_ty), mask=exists)
    else:
        HALF: tl.constexpr = STEP // 2
        k = tl.arange(0, HALF)
        packed = tl.load(weight + rows * weight_stride + (start // 2 + k)[None, :])
        group = scales + (start // HALF) * outputs + known
        for half in tl.static_range(2):
            at = start + half * HALF + k
            exists = (channel < outputs)[:, None] & (at < inputs)[None, :]
            nibble = (packed >> 4) if half else (packed & 15)
            scale = tl.load(group + half * outputs).to(tl.float32)
            wide = (nibble.to(tl.float32) - 8.0) * scale[:, None]
            tl.store(out + rows * inputs + at[None, :], wide.to(out.dtype.element_ty), mask=exists)
