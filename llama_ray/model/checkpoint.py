"""Read and write the Hugging Face LLaMA layout: config.json and safetensors. Nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llama_ray.model.config import LlamaConfig
from llama_ray.model.hf_config import from_hf, to_hf
from llama_ray.model.llama import Llama
from llama_ray.model.sharded_safetensors import StoredTensor, open_tensors
from llama_ray.storage.atomic import replacing, replacing_path

MAX_SHARD_BYTES = 4 * 1024**3
"""`save_model` starts another file beyond this size."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_RANK_FILES = (
    "model-rank*.safetensors"  # Of a training run, one a worker; see `llama_ray.model.sharded_safetensors`.
)

WeightSlicer = Callable[[str, tuple[int, ...]], tuple[slice, ...]]
"""The name and shape of a parameter -> the slice of it, in each dimension, that this process keeps."""


class CheckpointError(ValueError):
    """A directory that cannot be read as a LLaMA checkpoint; the message gives the reason and the way out."""


def load_config(directory: str | Path) -> LlamaConfig:
    """Read `directory/config.json`. Raises CheckpointError."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no config.json; give the directory of a saved LLaMA model")
    try:
        return from_hf(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_model(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    slicer: WeightSlicer | None = None,
) -> Llama:
    """Read a model saved by `save_model`, by transformers or by a training run, in one file or many.

    `dtype` None keeps the dtype of the stored embedding. With `slicer` only the chosen slice of each tensor is read,
    and the model's weights have the size of their slices. All names, shapes and file lengths are checked before the
    weights are allocated; tensors are then copied one at a time, so that the model is never in memory twice.
    Raises CheckpointError for a missing, truncated or unsafe file, and for missing, surplus or misshapen tensors.
    """
    directory = Path(directory)
    model = Llama(load_config(directory), device="meta")
    with ExitStack() as stack:
        stored = _open_all(_weight_files(directory), stack)
        _check_names_and_shapes(directory, stored, model)
        slices: dict[str, tuple[slice, ...]] = {}
        if slicer is not None:
            slices = {n: slicer(n, tuple(p.shape)) for n, p in model.named_parameters()}
            for name, kept in slices.items():
                _slice_parameter(model, name, kept)
            model.tie_weights()
        model.to(dtype or stored["model.embed_tokens.weight"].dtype)
        model.materialize(device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(stored[hf_name(name)].read(slices.get(name)))
    return model


def save_model(
    model: Llama,
    directory: str | Path,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `config.json`, `generation_config.json` and `model*.safetensors`, which transformers reads unchanged.

    Weights keep the model's dtype. Each file is replaced atomically. `config.json` is written last: a directory that
    holds one is complete.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {hf_name(n): p.detach() for n, p in model.named_parameters()}
    shards = list(_split(tensors, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = _SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        with replacing_path(directory / file) as partial:
            save_file({n: tensors[n].cpu().contiguous() for n in names}, partial, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors.values())
        write_json(directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    save_config(model.config, model.embed_tokens.weight.dtype, directory, bos_id=bos_id, eos_id=eos_id)


def save_config(
    config: LlamaConfig,
    dtype: torch.dtype,
    directory: Path,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> None:
    """Write `generation_config.json`, then `config.json`, for weights of `dtype`."""
    generation = {"bos_token_id": bos_id, "eos_token_id": eos_id, "do_sample": True}
    write_json(directory / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
    name = str(dtype).removeprefix("torch.")
    write_json(directory / "config.json", to_hf(config, dtype=name, bos_id=bos_id, eos_id=eos_id))


def hf_name(name: str) -> str:
    """Return the Hugging Face name of a parameter of `Llama`."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` atomically: readers see the old file or the new one, also after a crash."""
    with replacing(path) as file:
        file.write(f"{json.dumps(content, indent=2)}\n".encode())


def _split(tensors: dict[str, Tensor], max_bytes: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += tensor.nbytes
    yield shard


def _weight_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [n for n in names if not (directory / n).is_file()]
        if missing:
            raise CheckpointError(f"{directory} lacks {', '.join(missing)}, named in {_INDEX}; copy it again")
        return [directory / n for n in names]
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    if files := sorted(directory.glob(_RANK_FILES)):
        return files
    pickled = sorted(p.name for p in directory.glob("pytorch_model*.bin"))
    if pickled:
        raise CheckpointError(
            f"{directory} holds {pickled[0]}, a pickle, which can run code and is not opened; rewrite it where you "
            "trust it with transformers: AutoModelForCausalLM.from_pretrained(D).save_pretrained(NEW)"
        )
    raise CheckpointError(
        f"{directory} holds no model.safetensors; give the directory of a saved LLaMA model"
    )


def _slice_parameter(model: Llama, name: str, kept: tuple[slice, ...]) -> None:
    """Replace a parameter on the meta device by one of the slice's shape."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    weight = module.get_parameter(attribute)[kept]
    module.register_parameter(attribute, torch.nn.Parameter(weight.detach().clone()))
    if isinstance(module, torch.nn.Linear):
        module.out_features, module.in_features = weight.shape


def _open_all(files: list[Path], stack: ExitStack) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for file in files:
        try:
            open_tensors(file, stack, stored)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is damaged or cut short ({error}); copy or save it again"
            ) from error
    return stored


def _check_names_and_shapes(directory: Path, stored: dict[str, StoredTensor], model: Llama) -> None:
    expected = {hf_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    # Older exports hold the rotary frequencies, some a second copy of a tied head; both follow from the rest.
    surplus = {n for n in stored if n not in expected and not n.endswith("rotary_emb.inv_freq")}
    if model.config.tie_embeddings:
        surplus.discard("lm_head.weight")
    missing = expected.keys() - stored.keys()
    for what, names in (("lacks", missing), ("has unexpected", surplus)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(
                f"{directory} {what} {shown}; give weights and config.json of the same model"
            )
    for name, shape in expected.items():
        if not stored[name].complete:
            raise CheckpointError(
                f"{directory} lacks slices of {name}; copy it again, with all {_RANK_FILES} files"
            )
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{directory}: {name} is {list(stored[name].shape)}; config.json says {list(shape)}; "
                "give weights and config.json of the same model"
            )
