"""What a run needs to go on where it stopped: which tensors a worker writes, and how any set of workers reads them.

A checkpoint is a directory of safetensors files, `model-rank*` and `optimizer-rank*`, in the layout of
torch.distributed.checkpoint's safetensors storage, with `config.json`, the tokenizer and, last, `training.json`. So
`dcp.load` reshards it onto any mesh, `load_pretrained` opens it as a model, and nothing in it is a pickle.

Each worker writes a part of its own: of a sharded tensor its shard, of a replicated one its share of the names. DCP's
own writer is not used for that: it gathers a plan over all workers for each checkpoint and then holds every file in
memory.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor, Replicate

from llama_ray.model.checkpoint import CheckpointError, hf_name
from llama_ray.model.llama import Llama
from llama_ray.storage.run_directory import MARKER
from llama_ray.training.checkpointing.tensor_file import Piece, in_file_order

_SEPARATOR = "|"  # cannot be part of a parameter's name
_RNG = "rng"
# What wrappers put into the names of parameters; a checkpoint knows the plain model's names only.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")


@dataclass
class Progress:
    """How far a run is. The learning rate is a function of the step."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Targets trained on, by all workers."""
    validation_loss: float | None = None
    """The last one measured, nats per token."""
    skipped_steps: int = 0
    """Steps without an update, because the loss or a gradient was not finite."""
    loader: dict[str, int] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    run_id: str | None = None
    """Of the MLflow run that the steps were logged to."""
    unsent: list[Any] = field(default_factory=list)
    """What MLflow had not taken yet when the checkpoint was made."""

    def marker(self, files: dict[str, dict[str, Any]]) -> str:
        """The content of `training.json`: this, and the length and SHA-256 of every other file."""
        return json.dumps(asdict(self) | {"files": files}, indent=2) + "\n"


Part = dict[str, dict[str, Piece]]
"""What one worker writes: file name -> tensor name -> piece, the pieces in the order of the file."""


def own_part(model: Llama, optimizer: torch.optim.Optimizer, rank: int, world_size: int) -> Part:
    """The part of the state that this worker writes: the tensors themselves, which training goes on to change."""
    part: Part = {f"{kind}-rank{rank:05d}.safetensors": {} for kind in ("model", "optimizer")}
    model_part, optimizer_part = part.values()
    load = [0] * world_size
    on_gpu = False
    for in_model, name, tensor in _tensors(model, optimizer):
        piece = _own_piece(name, tensor, rank, load)
        if piece is not None:
            on_gpu |= piece.tensor.is_cuda
            (model_part if in_model else optimizer_part)[name] = piece
    # Nothing in training draws random numbers today; the state is kept so that it may.
    optimizer_part[f"{_RNG}{_SEPARATOR}cpu{_SEPARATOR}{rank}"] = _whole(torch.get_rng_state())
    if on_gpu:
        optimizer_part[f"{_RNG}{_SEPARATOR}cuda{_SEPARATOR}{rank}"] = _whole(torch.cuda.get_rng_state())
    return {file: in_file_order(pieces) for file, pieces in part.items() if pieces}


def load_progress(directory: str | Path) -> Progress:
    """Read how far the run of a checkpoint was. Raises CheckpointError where there is none."""
    path = Path(directory) / MARKER
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is no training checkpoint (no {MARKER}); name a step_* directory of a run"
        )
    content = json.loads(path.read_text())
    return Progress(**{f.name: content[f.name] for f in fields(Progress)})


def load_state(
    directory: Path, model: Llama, optimizer: torch.optim.Optimizer, rank: int, world_size: int
) -> Progress:
    """Fill `model` and `optimizer` from a checkpoint; each worker reads what it holds, however it was sharded.

    Raises CheckpointError where a file is damaged or missing.
    """
    progress = load_progress(directory)
    try:
        reader = HuggingFaceStorageReader(str(directory))
        stored = {
            name: entry
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        wanted: dict[str, Tensor] = {}
        for name, parameter in plain_parameters(model):
            wanted[hf_name(name)] = parameter.detach()
            for key in _optimizer_keys(stored, name):
                slot = f"{key}{_SEPARATOR}{name}"
                whole = stored[slot].size
                wanted[slot] = (
                    torch.empty_like(parameter.detach())
                    if whole == parameter.shape
                    else torch.empty(whole, dtype=stored[slot].properties.dtype, device=parameter.device)
                )
        generators = [k for k in stored if k.startswith(_RNG) and k.endswith(f"{_SEPARATOR}{rank}")]
        wanted |= {k: torch.empty(stored[k].size, dtype=torch.uint8) for k in generators}
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # "assuming the intent is to load in a single process"
            load(wanted, storage_reader=reader, no_dist=True)
    except (SafetensorError, OSError, RuntimeError, KeyError, CheckpointException) as e:
        reason = str(e).strip().splitlines()[-1]
        raise CheckpointError(f"{directory} is damaged ({reason}); resume from an earlier checkpoint") from e
    for name, parameter in plain_parameters(model):
        keys = _optimizer_keys(stored, name)
        if keys:
            slots = {key: wanted[f"{key}{_SEPARATOR}{name}"] for key in keys}
            optimizer.state[parameter] = {
                key: value.reshape(()) if value.numel() == 1 else value for key, value in slots.items()
            }
    workers = sum(k.startswith(f"{_RNG}{_SEPARATOR}cpu") for k in stored)
    if workers == world_size:  # another number of workers has no use for these
        for key in generators:
            restore = (
                torch.cuda.set_rng_state if f"{_SEPARATOR}cuda{_SEPARATOR}" in key else torch.set_rng_state
            )
            restore(wanted[key])
    return progress


def _tensors(model: Llama, optimizer: torch.optim.Optimizer) -> Iterator[tuple[bool, str, Tensor]]:
    """(part of the model?, name in the checkpoint, tensor), in an order that is the same on every worker."""
    for name, parameter in plain_parameters(model):
        yield True, hf_name(name), parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield False, f"{key}{_SEPARATOR}{name}", value.detach()


def plain_parameters(model: Llama) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Names and parameters, the names without what wrappers put into them."""
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        yield name, parameter


def _optimizer_keys(stored: dict[str, Any], name: str) -> list[str]:
    suffix = f"{_SEPARATOR}{name}"
    return [key.removesuffix(suffix) for key in stored if key.endswith(suffix)]


def _own_piece(name: str, tensor: Tensor, rank: int, load: list[int]) -> Piece | None:
    """What this worker writes of `tensor`; None where others write it. `load` sums up the bytes given to each."""
    if not isinstance(tensor, DTensor):
        owner = load.index(min(load))
        load[owner] += tensor.nbytes
        return _whole(tensor) if owner == rank else None
    place = tensor.device_mesh.get_coordinate()
    if place is None:
        return None
    copies = [
        (i, n) for i, n in enumerate(tensor.device_mesh.shape) if isinstance(tensor.placements[i], Replicate)
    ]
    turn = zlib.crc32(name.encode())  # which of the replicas writes; the same on all of them
    if any(place[i] != turn % n for i, n in copies):
        return None
    [chunk] = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    local = tensor.to_local()
    if local.numel() == 0:
        return None
    return Piece(local, tuple(chunk.offsets), local.shape == tensor.shape)


def _whole(tensor: Tensor) -> Piece:
    tensor = (
        tensor.reshape(-1) if tensor.dim() == 0 else tensor
    )  # DCP's reader cuts slices, of scalars it cannot
    return Piece(tensor, (0,) * tensor.dim(), True)
