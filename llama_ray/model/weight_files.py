"""Which files of a directory hold a model's weights, as Hugging Face and training runs name them."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack, suppress
from pathlib import Path

from safetensors import SafetensorError

from llama_ray.model.sharded_safetensors import StoredTensor, open_tensors
from llama_ray.utils.fields import shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
RANK_FILES = (
    "model-rank*.safetensors"  # Of a training run, one a worker; see `llama_ray.model.sharded_safetensors`.
)
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

# The first bytes of the small text file that Git LFS keeps in place of a large one.
_LFS_POINTER = b"version https://git-lfs"
# What other libraries write, and the way to what is read here.
_PICKLES = ("pytorch_model*.bin", "consolidated*.pth", "*.pt", "*.pth", "*.ckpt")
_OTHER_FORMATS = {
    "adapter_model.*": "an adapter without adapter_config.json; copy that too",
    "*.gguf": "llama.cpp's format; give the file itself",
    "consolidated*.safetensors": "Mistral's format; use the model's Hugging Face directory",
}


class CheckpointError(ValueError):
    """A directory that cannot be read as a LLaMA checkpoint; the message gives the reason and the way out."""


def open_weights(directory: Path, stack: ExitStack) -> dict[str, StoredTensor]:
    """Return the tensors of `directory` by name, unread; `stack` closes their files.

    As in transformers, one file comes before several with an index; files of a training run come last. Raises
    CheckpointError for missing and damaged files, and for a tensor that two files hold.
    """
    home = _read_index(directory)
    if home is None or ((directory / SINGLE).is_file() and SINGLE not in home.values()):
        home, files = None, _weight_files(directory)
    else:
        files = sorted({directory / name for name in home.values()})
    stored: dict[str, StoredTensor] = {}
    whole: dict[str, Path] = {}
    for file in files:
        for name, tensor in _open(file, stack).items():
            if home is not None and home.get(name, file.name) != file.name:
                continue
            if name in stored and (name in whole or not tensor.is_slice):
                raise CheckpointError(
                    f"{directory} holds {name} twice, in {whole.get(name, file).name} and {file.name}; remove the "
                    "file of another save"
                )
            if not tensor.is_slice:
                whole[name] = file
            stored.setdefault(name, StoredTensor(name)).extend(tensor)
    return stored


def weight_file_names(directory: Path) -> list[str]:
    """Return the names of all weight files in `directory` that `open_weights` may read, but for a training run's."""
    shards = {path.name for path in directory.glob("model-*.safetensors") if SHARD.fullmatch(path.name)}
    # Files that a damaged index names cannot be told from others.
    with suppress(CheckpointError):
        shards |= {name for name in (_read_index(directory) or {}).values() if name.endswith(".safetensors")}
    return [SINGLE, INDEX, *sorted(shards)]


def _read_index(directory: Path) -> dict[str, str] | None:
    """Return the file name of each tensor, or None if there is no index."""
    index = directory / INDEX
    if not index.is_file():
        return None
    try:
        home = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(home.values()))
        # An index cannot reach outside its directory.
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"weight_map names {shown(names[:1])}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is no index of weights ({type(error).__name__}: {error}); copy or save the model again"
        ) from error
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(f"{directory} lacks {_listed(missing)}, named in {INDEX}; copy it again")
    return dict(home)


def _weight_files(directory: Path) -> list[Path]:
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if files := sorted(directory.glob(RANK_FILES)):
        return files
    if shards := sorted(path.name for path in directory.glob("model-*.safetensors")):
        raise CheckpointError(
            f"{directory} holds {_listed(shards)} but no {INDEX}, which names the file of each tensor; copy that too"
        )
    for pattern in _PICKLES:
        if pickled := sorted(path.name for path in directory.glob(pattern)):
            raise CheckpointError(
                f"{directory} holds {pickled[0]}, a pickle, which can run code and is not opened; rewrite it where you "
                "trust it with transformers: AutoModelForCausalLM.from_pretrained(D).save_pretrained(NEW)"
            )
    for pattern, meaning in _OTHER_FORMATS.items():
        if other := sorted(path.name for path in directory.glob(pattern)):
            raise CheckpointError(f"{directory} holds no {SINGLE} but {other[0]}, {meaning}")
    raise CheckpointError(f"{directory} holds no {SINGLE}; give the directory of a saved LLaMA model")


def _open(file: Path, stack: ExitStack) -> dict[str, StoredTensor]:
    try:
        return open_tensors(file, stack)
    except (SafetensorError, OSError) as error:
        with file.open("rb") as stream:
            if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise CheckpointError(
                    f"{file} is a pointer of Git LFS to the weights; fetch them with: git lfs pull"
                ) from error
        raise CheckpointError(f"{file} is damaged or cut short ({error}); copy or save it again") from error


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
