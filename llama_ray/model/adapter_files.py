"""Read and write adapters in the layout of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

A training checkpoint has the same files, but for its weights, which are in `adapter-rank*` files. Beside them lies
`adapter_base.json` with the digest of the weights that the adapter was trained on; adapters of PEFT have none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llama_ray.model.config_files import to_text
from llama_ray.model.lora import FACTOR_A, FACTOR_B
from llama_ray.model.lora_config import TARGETS, LoraConfig
from llama_ray.model.sharded_safetensors import StoredTensor, open_tensors
from llama_ray.model.stored_config import CONFIG_FILE
from llama_ray.model.weight_files import CheckpointError
from llama_ray.storage.replacement import Replacement
from llama_ray.utils.errors import printable
from llama_ray.utils.fields import shown

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_BASE = "adapter_base.json"
ADAPTER_RANK_FILES = "adapter-rank*.safetensors"

_PREFIX = "base_model.model."
_KEY = re.compile(
    rf"{re.escape(_PREFIX)}(?P<layer>model\.layers\.\d+\.(?:self_attn|mlp)\.(?:{'|'.join(TARGETS)}))"
    rf"\.(?P<factor>{FACTOR_A}|{FACTOR_B})\.weight"
)
_HUB_MODEL = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^@]+))?")
# What changes the meaning of the two factors, by its name in adapter_config.json, and the values that leave it.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "layer_replication": ([],),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "fan_in_fan_out": (False,),
    "use_qalora": (False,),
    "alora_invocation_tokens": ([],),
    "use_bdlora": (False,),
    "arrow_config": (),
    "velora_config": (),
    "kasa_config": (),
    "monteclora_config": (),
}
# These move a part of the base's weights into the factors, so that the base as it is stored does not fit.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in open files."""

    config: LoraConfig
    base: str
    """A reference to the model that it adapts: a path, `models:/NAME/3`, or `hf://ORG/NAME@REVISION`."""
    base_weights: str | None
    """The `weights_hash` of that model; None where it is not known."""
    factors: Mapping[str, tuple[StoredTensor, StoredTensor]]
    """A [rank, inputs] and B [outputs, rank] by the Hugging Face name of the weight that they are added to."""


def is_adapter(path: Path) -> bool:
    """Return whether `path` is the directory of an adapter, not of a whole model."""
    return (path / ADAPTER_CONFIG).is_file()


def base_of(directory: Path) -> str:
    """Return the reference to the model that the adapter in `directory` adapts. Raises CheckpointError."""
    return _base_reference(directory, _read_json(directory / ADAPTER_CONFIG))


def peft_name(name: str) -> str:
    """Return the name that PEFT's file has for the factor `name`, which is by Hugging Face's names."""
    return _PREFIX + name


def open_adapter(directory: Path, stack: ExitStack) -> StoredAdapter:
    """Open the adapter in `directory`; `stack` closes its files.

    Raises CheckpointError, which names it, for what is missing, damaged, or not a plain LoRA of a LLaMA's linear
    layers.
    """
    content = _read_json(directory / ADAPTER_CONFIG)
    _check_supported(directory, content)
    factors = _factors(directory, _open_files(directory, stack))
    config = _lora_config(directory, content, {name.split(".")[-2] for name in factors})
    for name, (a, b) in factors.items():
        if a.shape[:1] != (config.rank,) or b.shape[1:] != (config.rank,):
            raise CheckpointError(
                f"{directory}: the factors of {name} are {list(a.shape)} and {list(b.shape)}; {ADAPTER_CONFIG} says "
                f"rank {config.rank}; give weights and configuration of the same adapter"
            )
    base = _base_reference(directory, content)
    return StoredAdapter(config, base, stored_base_weights(directory), factors)


def load_lora_config(directory: Path) -> LoraConfig:
    """Read what `adapter_config.json` says of an adapter that was saved here, without its weights."""
    content = _read_json(directory / ADAPTER_CONFIG)
    return _lora_config(directory, content, content.get("target_modules") or ())


def stored_base_weights(directory: Path) -> str | None:
    """Return the `weights_hash` of the model that the adapter in `directory` was trained on; None if unknown."""
    file = directory / ADAPTER_BASE
    value = _read_json(file).get("weights_hash") if file.is_file() else None
    return value if isinstance(value, str) else None


def adapter_texts(config: LoraConfig, base: str, base_weights: str | None) -> dict[str, str]:
    """Return the texts of `adapter_config.json` and `adapter_base.json`, by name; `base` is a reference.

    The second is left out where the `weights_hash` of the base is not known.
    """
    name, revision = base, None
    if match := _HUB_MODEL.fullmatch(base):
        # PEFT knows the hub by plain names.
        name, revision = match["name"], match["revision"]
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "use_rslora": config.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }
    texts = {ADAPTER_CONFIG: to_text(content)}
    return texts if base_weights is None else {ADAPTER_BASE: to_text({"weights_hash": base_weights}), **texts}


def save_adapter(
    directory: Path,
    config: LoraConfig,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    base: str,
    base_weights: str | None,
    beside: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write an adapter that PEFT reads as it is.

    `factors` are A and B by the Hugging Face name of the weight, as in `StoredAdapter`; `beside` are further files,
    by name. Raises CheckpointError for the directory of a whole model, which would be taken for an adapter, and of a
    training checkpoint, whose weights belong to its optimizer.
    """
    if training := next(directory.glob(ADAPTER_RANK_FILES), None):
        raise CheckpointError(
            f"{directory} is a checkpoint of a training run ({training.name}); give another directory to save to"
        )
    if (directory / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{directory} holds a whole model ({CONFIG_FILE}); give another directory to save to"
        )
    tensors = {
        peft_name(f"{name.removesuffix('.weight')}.{factor}.weight"): tensor.detach().cpu().contiguous()
        for name, pair in factors.items()
        for factor, tensor in zip((FACTOR_A, FACTOR_B), pair, strict=True)
    }
    with Replacement(directory, marker=ADAPTER_CONFIG) as new:
        save_file(tensors, new.path(ADAPTER_WEIGHTS), metadata={"format": "pt"})
        for name, text in {**beside, **adapter_texts(config, base, base_weights)}.items():
            new.write(name, text)
        new.commit(superseded=[])


def _lora_config(directory: Path, content: Mapping[str, Any], targets: Collection[str]) -> LoraConfig:
    try:
        return LoraConfig(
            rank=content.get("r", 8),
            alpha=content.get("lora_alpha", 8),
            dropout=content.get("lora_dropout") or 0.0,
            targets=tuple(target for target in TARGETS if target in targets),
            rslora=content.get("use_rslora") or False,
        )
    except ValueError as error:
        raise CheckpointError(f"{directory / ADAPTER_CONFIG}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({printable(str(error))}); copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {shown(content)}; it must hold an object; copy it again")
    return content


def _check_supported(directory: Path, content: dict[str, Any]) -> None:
    way_out = "merge it into its model with peft's merge_and_unload, and give the result"
    kind = content.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{directory} holds an adapter of type {shown(kind)}; only LORA can be read; {way_out}"
        )
    for name, harmless in _UNSUPPORTED.items():
        value = content.get(name)
        if value is not None and value not in harmless:
            raise CheckpointError(
                f"{directory} holds an adapter with {name} {shown(value)}, which cannot be read; {way_out}"
            )
    init = content.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise CheckpointError(
            f"{directory} holds an adapter with init_lora_weights {shown(init)}, which changes the base's weights; "
            f"{way_out}"
        )


def _open_files(directory: Path, stack: ExitStack) -> dict[str, StoredTensor]:
    whole = directory / ADAPTER_WEIGHTS
    files = [whole] if whole.is_file() else sorted(directory.glob(ADAPTER_RANK_FILES))
    if not files:
        if (directory / "adapter_model.bin").is_file():
            raise CheckpointError(
                f"{directory} holds adapter_model.bin, a pickle, which can run code and is not opened; save it again "
                "with peft, which writes safetensors"
            )
        raise CheckpointError(f"{directory} holds no {ADAPTER_WEIGHTS}; copy the adapter again")
    stored: dict[str, StoredTensor] = {}
    for file in files:
        try:
            tensors = open_tensors(file, stack)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged or cut short ({error}); copy it again") from error
        for name, tensor in tensors.items():
            stored.setdefault(name, StoredTensor(name)).extend(tensor)
    return stored


def _factors(
    directory: Path, stored: dict[str, StoredTensor]
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    matches = {name: _KEY.fullmatch(name) for name in stored}
    if odd := next((name for name, match in matches.items() if match is None), None):
        raise CheckpointError(
            f"{directory} has an adapter of {printable(odd)}; only the linear layers of a LLaMA's blocks "
            f"({', '.join(TARGETS)}) can have one; merge it into its model with peft's merge_and_unload"
        )
    layers = {match["layer"]: None for match in matches.values() if match is not None}
    factors = {}
    for layer in layers:
        names = [peft_name(f"{layer}.{factor}.weight") for factor in (FACTOR_A, FACTOR_B)]
        for name in names:
            if name not in stored or not stored[name].complete or len(stored[name].shape) != 2:
                raise CheckpointError(
                    f"{directory} lacks (a part of) {name}; copy it again, with all its files"
                )
        factors[f"{layer}.weight"] = (stored[names[0]], stored[names[1]])
    if not factors:
        raise CheckpointError(f"{directory} holds an adapter without weights; copy it again")
    return factors


def _base_reference(directory: Path, content: dict[str, Any]) -> str:
    name, revision = content.get("base_model_name_or_path"), content.get("revision")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{directory / ADAPTER_CONFIG} names no base_model_name_or_path; write the path or models:/NAME/VERSION of "
            "the adapted model there"
        )
    if Path(name).expanduser().resolve() == directory.resolve():
        raise CheckpointError(
            f"base_model_name_or_path in {directory / ADAPTER_CONFIG} is the adapter itself; write the path or "
            "models:/NAME/VERSION of the adapted model there"
        )
    hub = f"hf://{name}@{revision}" if isinstance(revision, str) and revision else f"hf://{name}"
    return hub if _HUB_MODEL.fullmatch(hub) and not Path(name).exists() else name
