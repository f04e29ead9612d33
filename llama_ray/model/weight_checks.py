"""Checks that stored tensors are those of a model, before its memory is allocated."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from llama_ray.model.sharded_safetensors import StoredTensor
from llama_ray.model.weight_files import RANK_FILES, CheckpointError

# As safetensors names them. Others (float8, integers) are numbers only together with scales.
_FLOATS = ("F64", "F32", "BF16", "F16")
# Ends of the names of tensors that only quantized checkpoints have.
_QUANTIZED = {
    ".g_idx": "GPTQ",
    ".qzeros": "GPTQ or AWQ",
    ".qweight": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".input_scale": "FP8",
    ".W_q": "HQQ",
}


def check_tensors(
    directory: Path, stored: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError unless `stored` are whole float tensors of these names and `shapes`, and no others."""
    # Older exports hold the rotary frequencies, which follow from the configuration.
    surplus = {name for name in stored if name not in shapes and not name.endswith("rotary_emb.inv_freq")}
    _check_quantization(directory, surplus)
    for what, names in (("lacks", shapes.keys() - stored.keys()), ("has unexpected", surplus)):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(
                f"{directory} {what} {listed}; give weights and config.json of the same model"
            )
    for name, shape in shapes.items():
        _check_tensor(directory, name, stored[name], shape)


def refuse_quantized(directory: Path, kind: str) -> None:
    """Raise CheckpointError for weights in the format `kind`."""
    raise CheckpointError(
        f"{directory} holds quantized weights ({kind}); only float32, bfloat16 and float16 weights can be loaded; "
        "give the model that they were made from"
    )


def _check_quantization(directory: Path, names: Collection[str]) -> None:
    for end, kind in _QUANTIZED.items():
        if any(name.endswith(end) or f"{end}." in name for name in names):
            refuse_quantized(directory, kind)


def _check_tensor(directory: Path, name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.kind not in _FLOATS:
        refuse_quantized(directory, "FP8" if tensor.kind.startswith("F8") else tensor.kind)
    if len(tensor.shape) == len(shape) and not tensor.complete:
        raise CheckpointError(
            f"{directory} lacks slices of {name}; copy it again, with all {RANK_FILES} files"
        )
    if tensor.shape != shape:
        raise CheckpointError(
            f"{directory}: {name} is {list(tensor.shape)}; config.json says {list(shape)}; "
            "give weights and config.json of the same model"
        )
