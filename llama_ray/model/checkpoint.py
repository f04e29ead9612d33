"""Weights on disk, in the layout of a Hugging Face LLaMA checkpoint. Nothing is ever unpickled."""

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
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
PIECE_FILES = "model-rank*.safetensors"
"""What the workers of a training run wrote, see `llama_ray.model.sharded_safetensors`."""

Part = Callable[[str, tuple[int, ...]], tuple[slice, ...]]
"""The name and shape of a parameter -> what of it a process keeps."""


class CheckpointError(ValueError):
    """A directory that cannot be read as a LLaMA checkpoint; the message says why and what helps."""


def load_config(directory: str | Path) -> LlamaConfig:
    """The shape recorded in `directory/config.json`. Raises CheckpointError."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no config.json; give the directory of a saved LLaMA model")
    try:
        return from_hf(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path}: {e}") from e


def load_model(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    part: Part | None = None,
) -> Llama:
    """Read a model saved by `save_model`, by transformers or by a training run, in one file or many.

    `dtype` None keeps the dtype of the stored embedding. Names, shapes and file lengths are all checked before memory
    is taken for the weights; then tensors are copied one at a time, so no second copy of the model is held. With
    `part` only that of each tensor is read, and the model has weights of that size.
    Raises CheckpointError for a missing, truncated or unsafe file, and for missing, surplus or misshapen tensors.
    """
    directory = Path(directory)
    model = Llama(load_config(directory), device="meta")
    with ExitStack() as stack:
        stored = _open_all(_weight_files(directory), stack)
        wanted = {hf_name(n): p for n, p in model.named_parameters()}
        _check_names_and_shapes(directory, stored, wanted, model.config)
        file_dtype = stored["model.embed_tokens.weight"].dtype
        parts = {n: part and part(n, tuple(p.shape)) for n, p in model.named_parameters()}
        for name, kept in parts.items():
            if kept is not None:
                _cut(model, name, kept)
        model.tie_weights()
        model.to(dtype or file_dtype)
        model.materialize(device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(stored[hf_name(name)].read(parts[name]))
    return model


def save_model(
    model: Llama,
    directory: str | Path,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `config.json`, `generation_config.json` and `model*.safetensors` that transformers opens as they are.

    Weights keep the model's dtype. Each file appears whole or not at all; `config.json` is written last, so a
    directory that has one is complete.
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
    """Write `generation_config.json` and then `config.json`, which describe weights of `dtype`."""
    generation = {"bos_token_id": bos_id, "eos_token_id": eos_id, "do_sample": True}
    write_json(directory / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
    name = str(dtype).removeprefix("torch.")
    write_json(directory / "config.json", to_hf(config, dtype=name, bos_id=bos_id, eos_id=eos_id))


def hf_name(name: str) -> str:
    """The name that a parameter of `Llama` has in a Hugging Face checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `path` so that a reader, or a crash, sees the old file or the new one and nothing between."""
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
    if pieces := sorted(directory.glob(PIECE_FILES)):
        return pieces
    pickled = sorted(p.name for p in directory.glob("pytorch_model*.bin"))
    if pickled:
        raise CheckpointError(
            f"{directory} holds {pickled[0]}, a pickle, which can run code and is not opened; rewrite it where you "
            "trust it with transformers: AutoModelForCausalLM.from_pretrained(D).save_pretrained(NEW)"
        )
    raise CheckpointError(
        f"{directory} holds no model.safetensors; give the directory of a saved LLaMA model"
    )


def _cut(model: Llama, name: str, kept: tuple[slice, ...]) -> None:
    """Give a parameter on the meta device the shape of its part."""
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
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{file} is damaged or cut short ({e}); copy or save it again") from e
    return stored


def _check_names_and_shapes(
    directory: Path,
    stored: dict[str, StoredTensor],
    wanted: dict[str, torch.nn.Parameter],
    config: LlamaConfig,
) -> None:
    # Older exports carry the rotary table, and some a second copy of a tied head; both follow from the rest.
    surplus = {n for n in stored if n not in wanted and not n.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        surplus.discard("lm_head.weight")
    missing = wanted.keys() - stored.keys()
    for what, names in (("lacks", missing), ("has unexpected", surplus)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(
                f"{directory} {what} {shown}: weights and config.json are not of the same model"
            )
    for name, parameter in wanted.items():
        shape = stored[name].shape
        if not stored[name].complete:
            raise CheckpointError(
                f"{directory} lacks pieces of {name}; copy it again, with every {PIECE_FILES}"
            )
        if shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{directory}: {name} is {list(shape)} but config.json makes it {list(parameter.shape)}; "
                "weights and config.json are not of the same model"
            )
