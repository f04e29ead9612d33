"""The tensors of a checkpoint: which ones each worker writes, and how any set of workers reads them.

A checkpoint is a directory of safetensors files, `model-rank*` and `optimizer-rank*`, in the layout of
torch.distributed.checkpoint's safetensors storage, with `config.json`, the tokenizer and, last, `training.json`. So
`dcp.load` reshards it onto any mesh, `load_pretrained` opens it as a model, and nothing in it is a pickle. Of a model
with adapters it holds these alone, as `adapter-rank*` by PEFT's names, beside the files of an adapter.

Each worker writes its own shard of a sharded tensor, and a share of the replicated tensors as a whole. DCP's own writer
is not used for that: for each checkpoint it gathers a plan over all workers and then holds every file in memory.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor, Replicate

from llama_ray.model.adapter_files import peft_name
from llama_ray.model.llama import Llama
from llama_ray.model.parameter_names import hf_name
from llama_ray.model.weight_files import CheckpointError
from llama_ray.storage import run_directory
from llama_ray.training.checkpointing.tensor_file import TensorShard, in_file_order
from llama_ray.utils.torch_private import shard_offsets

RankFiles = dict[str, dict[str, TensorShard]]
"""What one worker writes: file name -> tensor name -> shard, the shards in the order of the file."""

# No parameter name contains it.
_SEPARATOR = "|"
# What wrappers put into the names of parameters; a checkpoint holds the names of the plain model.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")

_Stored = dict[str, TensorStorageMetadata]


def rank_files(model: Llama, optimizer: torch.optim.Optimizer, rank: int, world_size: int) -> RankFiles:
    """Return what this worker writes: the live tensors of the model and the optimizer, which training will change."""
    kind = "model" if model.lora is None else "adapter"
    model_file, optimizer_file = f"{kind}-rank{rank:05d}.safetensors", f"optimizer-rank{rank:05d}.safetensors"
    files: RankFiles = {model_file: {}, optimizer_file: {}}
    assigned_bytes = [0] * world_size
    for in_model, name, tensor in _tensors(model, optimizer):
        shard = _shard_to_write(name, tensor, rank, assigned_bytes)
        if shard is not None:
            files[model_file if in_model else optimizer_file][name] = shard
    on_gpu = any(shard.tensor.is_cuda for shards in files.values() for shard in shards.values())
    # Dropout is seeded in each step; the state is kept for what else may draw numbers.
    files[optimizer_file][_rng_name("cpu", rank)] = _whole(torch.get_rng_state())
    if on_gpu:
        files[optimizer_file][_rng_name("cuda", rank)] = _whole(torch.cuda.get_rng_state())
    return {file: in_file_order(shards) for file, shards in files.items() if shards}


def load_state(
    directory: Path, model: Llama, optimizer: torch.optim.Optimizer, rank: int, world_size: int
) -> None:
    """Fill `model` and `optimizer` from a checkpoint; each worker reads its own shards, however it was sharded.

    Raises CheckpointError if a file is damaged or missing.
    """
    try:
        with _recorded_files(directory) as files, warnings.catch_warnings():
            reader = HuggingFaceStorageReader(str(files))
            stored: _Stored = {
                name: entry
                for name, entry in reader.read_metadata().state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            tensors = _tensors_to_fill(model, stored, rank)
            # "assuming the intent is to load in a single process"
            warnings.simplefilter("ignore", UserWarning)
            load(tensors, storage_reader=reader, no_dist=True)
    except (SafetensorError, OSError, RuntimeError, KeyError, CheckpointException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise CheckpointError(
            f"{directory} is damaged ({reason}); resume from an earlier checkpoint"
        ) from error
    _restore_optimizer(optimizer, model, stored, tensors)
    # The states of the random generators belong to ranks, so they are of no use to another number of workers.
    if world_size == sum(name.startswith(_rng_name("cpu", "")) for name in stored):
        _restore_generators(tensors, rank)


@contextmanager
def _recorded_files(directory: Path) -> Iterator[Path]:
    """Yield a directory with links to the tensor files of a checkpoint, and to no others.

    DCP reads every safetensors file of a directory, also one that the user put beside those of the checkpoint.
    """
    marker = run_directory.read_marker(str(directory.resolve())) or {"files": {}}
    with TemporaryDirectory() as links:
        for name in marker["files"]:
            if name.endswith(".safetensors"):
                Path(links, name).symlink_to(directory.resolve() / name)
        yield Path(links)


def trained_parameters(model: Llama) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield what `plain_parameters` does, but for frozen parameters: what a checkpoint holds."""
    for name, parameter in plain_parameters(model):
        if parameter.requires_grad:
            yield name, parameter


def plain_parameters(model: Llama) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield names and parameters, the names without what wrappers put into them."""
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        yield name, parameter


def _tensors(model: Llama, optimizer: torch.optim.Optimizer) -> Iterator[tuple[bool, str, Tensor]]:
    """Yield (part of the model?, name in the checkpoint, tensor) in an order that is the same on every worker."""
    for name, parameter in trained_parameters(model):
        yield True, _stored_name(model, name), parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield False, _optimizer_name(key, name), value.detach()


def _shard_to_write(name: str, tensor: Tensor, rank: int, assigned_bytes: list[int]) -> TensorShard | None:
    """Return the shard of `tensor` that this worker writes; None if other workers write all of it.

    `assigned_bytes`, by rank, balances the tensors that are not sharded.
    """
    if not isinstance(tensor, DTensor):
        writer = assigned_bytes.index(min(assigned_bytes))
        assigned_bytes[writer] += tensor.nbytes
        return _whole(tensor) if writer == rank else None
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    # Which replica writes; the same on all of them.
    replica = zlib.crc32(name.encode())
    for i, size in enumerate(mesh.shape):
        if isinstance(tensor.placements[i], Replicate) and coordinate[i] != replica % size:
            return None
    local = tensor.to_local()
    if local.numel() == 0:
        return None
    return TensorShard(local, shard_offsets(tensor), local.shape == tensor.shape)


def _whole(tensor: Tensor) -> TensorShard:
    # DCP's reader cuts slices, which a scalar does not have.
    tensor = tensor.reshape(-1) if tensor.dim() == 0 else tensor
    return TensorShard(tensor, (0,) * tensor.dim(), True)


def _tensors_to_fill(model: Llama, stored: _Stored, rank: int) -> dict[str, Tensor]:
    """Return the model's parameters, and empty tensors for this worker's shards of the rest, by name."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(model):
        weight = parameter.detach()
        tensors[_stored_name(model, name)] = weight
        for key in _optimizer_keys(stored, name):
            entry = stored[_optimizer_name(key, name)]
            tensors[_optimizer_name(key, name)] = (
                torch.empty_like(weight)
                if entry.size == weight.shape
                else torch.empty(entry.size, dtype=entry.properties.dtype, device=weight.device)
            )
    for name in (_rng_name("cpu", rank), _rng_name("cuda", rank)):
        if name in stored:
            tensors[name] = torch.empty(stored[name].size, dtype=torch.uint8)
    return tensors


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, model: Llama, stored: _Stored, tensors: dict[str, Tensor]
) -> None:
    for name, parameter in trained_parameters(model):
        values = {key: tensors[_optimizer_name(key, name)] for key in _optimizer_keys(stored, name)}
        if values:
            _check_optimizer(optimizer, parameter, values)
            optimizer.state[parameter] = {
                key: value.reshape(()) if value.numel() == 1 else value for key, value in values.items()
            }


def _check_optimizer(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, values: dict[str, Tensor]
) -> None:
    """Raise CheckpointError if the state `values` of `parameter` is that of another optimizer."""
    [group] = [group for group in optimizer.param_groups if any(parameter is p for p in group["params"])]
    is_muon, was_muon = bool(group.get("muon")), "momentum_buffer" in values
    if is_muon != was_muon:
        now, before = ("muon" if muon else "adamw" for muon in (is_muon, was_muon))
        raise CheckpointError(
            f"optimizer is {now}; the checkpoint was trained with {before}; give --optimizer {before}, or begin a new "
            "run with its weights alone with --init_from"
        )


def _restore_generators(tensors: dict[str, Tensor], rank: int) -> None:
    if (state := tensors.get(_rng_name("cpu", rank))) is not None:
        torch.set_rng_state(state)
    if (state := tensors.get(_rng_name("cuda", rank))) is not None:
        torch.cuda.set_rng_state(state)


def _stored_name(model: Llama, name: str) -> str:
    """Return the name that the files of weights have for a parameter."""
    return hf_name(name) if model.lora is None else peft_name(hf_name(name))


def _optimizer_name(key: str, parameter: str) -> str:
    """Return the name of an entry of the optimizer's state, such as `exp_avg|norm.weight`."""
    return f"{key}{_SEPARATOR}{parameter}"


def _optimizer_keys(stored: _Stored, parameter: str) -> list[str]:
    suffix = _optimizer_name("", parameter)
    return [name.removesuffix(suffix) for name in stored if name.endswith(suffix)]


def _rng_name(device: str, rank: int | str) -> str:
    """Return the name of a random generator's state, such as `rng|cpu|0`."""
    return f"rng{_SEPARATOR}{device}{_SEPARATOR}{rank}"
