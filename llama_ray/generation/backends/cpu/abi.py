"""The structures and functions that Python and the C++ kernels share, as abi.h declares them."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_void_p


class Cache(ctypes.Structure):
    """The paged cache of a model."""

    _fields_ = (
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
        ("block_stride", c_int64),
        ("is_bf16", c_int32),
    )


class Step(ctypes.Structure):
    """The sequences and tokens of one step, as in `StepBatch`."""

    _fields_ = (
        ("query_start", c_void_p),
        ("context_len", c_void_p),
        ("block_table", c_void_p),
        ("slots", c_void_p),
        ("sequences", c_int64),
        ("table_width", c_int64),
    )


class Linear(ctypes.Structure):
    """A packed weight matrix."""

    _fields_ = (
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("format", c_int32),
        ("x_is_bf16", c_int32),
        ("y_is_bf16", c_int32),
        ("is_gated", c_int32),
    )


class Block(ctypes.Structure):
    """The layers of one transformer block: addresses of `Linear` structures and of norm weights."""

    _fields_ = (
        ("qkv", c_void_p),
        ("o", c_void_p),
        ("gate_up", c_void_p),
        ("down", c_void_p),
        ("input_norm", c_void_p),
        ("post_attention_norm", c_void_p),
        ("hidden_size", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("intermediate_size", c_int64),
        ("eps", c_float),
        ("is_bf16", c_int32),
    )


class AdapterPart(ctypes.Structure):
    """One adapted matrix of a product."""

    _fields_ = (
        ("b", c_void_p),
        ("first_column", c_int64),
        ("rank", c_int64),
        ("first_output", c_int64),
        ("out_features", c_int64),
        ("scale", c_float),
    )


class AdapterProduct(ctypes.Structure):
    """What an adapter adds to one product of a block."""

    _fields_ = (
        ("a", c_void_p),
        ("in_features", c_int64),
        ("columns", c_int64),
        ("parts", c_void_p),
        ("num_parts", c_int64),
    )


class AdapterStep(ctypes.Structure):
    """The adapters of a step, and the rows of each."""

    _fields_ = (
        ("rows", c_void_p),
        ("segment_start", c_void_p),
        ("adapters", c_void_p),
        ("segments", c_int64),
    )


class DrawArguments(ctypes.Structure):
    """The `SamplingTensors` of the rows to draw from."""

    _fields_ = (
        ("width", c_int64),
        ("may_be_short", c_int32),
        ("temperature", c_void_p),
        ("outside_top_k", c_void_p),
        ("no_top_k", c_void_p),
        ("top_p", c_void_p),
        ("log_min_p", c_void_p),
        ("noise_keys", c_void_p),
    )


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    *(Cache, Step, Linear, Block),
    *(AdapterPart, AdapterProduct, AdapterStep, DrawArguments),
)

_FUNCTIONS: dict[str, list[type]] = {
    "linear": [c_void_p, c_void_p, c_int64, c_void_p, c_int],
    "linear_apart": [c_void_p, c_void_p, c_int64, c_void_p, c_int],
    "silu_product": [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int],
    "add_adapters": [c_void_p, c_int64, c_int, c_void_p, c_void_p, c_int64, c_int],
    "rms_norm": [c_int, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_int],
    "rope": [c_int, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int],
    "paged_attention": [
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_int64),
        *(c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_float, c_int),
    ],
    "blocks": [
        *(c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p),
        *(c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_float, c_void_p, c_int),
    ],
    "top_candidates": [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int],
    "draw": [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int],
}
"""The argument types of each kernel; none returns a value."""


def declare_functions(library: ctypes.CDLL) -> None:
    """Tell ctypes the signatures of the library's functions."""
    for name, arguments in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.struct_layouts.argtypes, library.struct_layouts.restype = [], c_char_p


def python_layouts() -> str:
    """Return what `struct_layouts` of abi.h should return: sizes, and the offset and size of each field."""
    return "\n".join(_layout(structure) for structure in STRUCTURES)


def _layout(structure: type[ctypes.Structure]) -> str:
    fields = ((name, getattr(structure, name)) for name, *_ in structure._fields_)
    parts = (f"{name} {field.offset} {field.size}" for name, field in fields)
    return " ".join([structure.__name__, str(ctypes.sizeof(structure)), *parts])
