"""Open a GGUF file as a model: its shape, and its weights by the names of Hugging Face, none of them read yet."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from llama_ray.model.config import LlamaConfig
from llama_ray.model.gguf.blocks import FORMATS, format_name
from llama_ray.model.gguf.metadata import read_config
from llama_ray.model.gguf.names import ROPE_FACTORS, gguf_name, is_key, is_query
from llama_ray.model.gguf.tensor import GgufTensor, MappedFile
from llama_ray.model.llama import Llama
from llama_ray.model.parameter_names import hf_name
from llama_ray.model.weight_files import CheckpointError
from llama_ray.storage.gguf import Gguf, GgufError, Tensor, read_gguf
from llama_ray.utils.errors import printable


def open_gguf(file: Path, stack: ExitStack) -> tuple[LlamaConfig, dict[str, GgufTensor]]:
    """Return the shape of the model in `file` and its tensors; `stack` closes the file.

    Quantized weights are read as the float32 numbers that they stand for. Raises CheckpointError for a damaged file, a
    model that is no LLaMA, a number format that cannot be read, and for missing, surplus or misshapen tensors.
    """
    try:
        gguf = read_gguf(file)
        _check_formats(gguf)
        mapped = MappedFile(file, stack)
        _check_ends(gguf, len(mapped.content))
        factors = gguf.tensors.get(ROPE_FACTORS)
        config = read_config(gguf, None if factors is None else GgufTensor(mapped, factors).read())
        places = _places(gguf, config)
    except GgufError as error:
        raise CheckpointError(str(error)) from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{printable(str(file))}: {error}") from error
    heads = {True: config.num_heads, False: config.num_kv_heads}
    return config, {
        name: GgufTensor(mapped, place, heads[is_query(name)] if is_query(name) or is_key(name) else None)
        for name, place in places.items()
    }


def read_gguf_config(file: Path) -> LlamaConfig:
    """Return the shape of the model in `file`. Raises CheckpointError as `open_gguf` does."""
    with ExitStack() as stack:
        return open_gguf(file, stack)[0]


def _check_formats(gguf: Gguf) -> None:
    for name, tensor in gguf.tensors.items():
        if tensor.type not in FORMATS:
            known = ", ".join(sorted(kind.name for kind in FORMATS.values()))
            raise ValueError(
                f"{name:.60} is in the format {format_name(tensor.type)}; it must be one of {known}; give the model "
                "in one of them, or its Hugging Face directory"
            )
        kind = FORMATS[tensor.type]
        if not tensor.shape or tensor.shape[-1] % kind.values:
            raise ValueError(
                f"{name:.60} is {list(tensor.shape)}, no whole blocks of {kind.name}; copy it again"
            )


def _check_ends(gguf: Gguf, size: int) -> None:
    for tensor in gguf.tensors.values():
        kind = FORMATS[tensor.type]
        if tensor.offset + tensor.size // kind.values * kind.size > size:
            raise ValueError("it is cut short; copy it again")


def _places(gguf: Gguf, config: LlamaConfig) -> Mapping[str, Tensor]:
    """Return where the tensors of `config` are, by their Hugging Face names in the order of `Llama`."""
    shapes = {
        hf_name(name): tuple(parameter.shape)
        for name, parameter in Llama(config, device="meta").named_parameters()
    }
    stored = {name for name in gguf.tensors if name != ROPE_FACTORS}
    expected = {gguf_name(name) for name in shapes}
    for what, names in (("lacks", expected - stored), ("has unexpected", stored - expected)):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(f"it {what} {listed:.200}; give the file of a whole LLaMA without biases")
    for name, shape in shapes.items():
        if (found := gguf.tensors[gguf_name(name)].shape) != shape:
            raise ValueError(
                f"{gguf_name(name)} is {list(found)}; its metadata say {list(shape)}; convert it again"
            )
    return {name: gguf.tensors[gguf_name(name)] for name in shapes}
