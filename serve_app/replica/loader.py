"""Load the engine of a version: what it takes from the registry, and whether there is memory for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from weakref import WeakSet

import psutil
import torch

from llama_ray.generation.backends.kv_cache import free_bytes
from llama_ray.generation.engine import Engine
from llama_ray.generation.memory import required_bytes
from llama_ray.generation.options import EngineOptions
from llama_ray.pretrained import resolve
from llama_ray.storage.paths import is_model_ref
from llama_ray.tracking import registry
from serve_app.registry.messages import EngineInfo, ModelVersion
from serve_app.replica import gate

DType = Literal["float32", "bfloat16", "float16"]
DEFAULT_OPTIONS = EngineOptions(max_num_seqs=16)

MAKE_ROOM = "set kv_cache_memory_bytes so that two versions fit, or use quantization"


class TooLargeError(Exception):
    """There is not enough memory for an engine; the message is one line with the way out."""


@dataclass(frozen=True)
class Files:
    """Where a version's model, and the model that drafts for it, are on this machine."""

    model: Path
    draft: Path | None = None


def resident_bytes() -> int:
    """Return the memory that this process and the other ranks of its engines hold now."""
    process = psutil.Process()
    return sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))


@dataclass(frozen=True)
class EngineLoader:
    """Makes the engines of a replica, all with the same options.

    References are resolved in the MLflow registry at `tracking_uri`. `dtype` None keeps the stored one. A version that
    has not answered the gate's prompt within `gate_timeout_s` fails. This process and its engines keep within
    `memory_bytes` of the machine's memory, if that is given.
    """

    tracking_uri: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: DType | None = None
    options: EngineOptions = DEFAULT_OPTIONS
    gate_timeout_s: float = 60.0
    memory_bytes: int | None = None
    _engines: WeakSet[Engine] = field(default_factory=WeakSet, init=False, repr=False, compare=False)
    _own_bytes: int = field(default_factory=resident_bytes, init=False, repr=False, compare=False)

    def fetch(self, version: ModelVersion) -> Files:
        """Download what is not on this machine yet. Raises TrackingError, or CheckpointError for no directory."""
        draft = self.options.draft_model
        return Files(self.local(version.location), None if draft is None else self.local(draft))

    def local(self, ref: str) -> Path:
        """Return where a reference is on this machine, after a download if need be. Raises as `fetch` does."""
        return registry.download(ref, self.tracking_uri) if is_model_ref(ref) else resolve(ref)

    def check_room(self, files: Files) -> None:
        """Raise TooLargeError if there is not enough free memory; ValueError for a bad checkpoint."""
        needed = required_bytes(files.model, self._torch_dtype, self.device, self._options(files))
        free = self.free_bytes()
        if needed > free:
            room = _gib(max(free, 0)) + ("" if self.memory_bytes is None else " of memory_bytes")
            raise TooLargeError(
                f"it needs {_gib(needed)} of memory on {self.device}, and {room} are free; {MAKE_ROOM}"
            )

    def free_bytes(self) -> int:
        """Return the free memory; of several GPUs, that of the fullest."""
        if self.device == "cpu":
            free = free_bytes(torch.device("cpu"))
            return free if self.memory_bytes is None else min(free, self.memory_bytes - self._taken_bytes())
        gpus = range(min(self.options.tensor_parallel, torch.cuda.device_count()))
        return min(free_bytes(torch.device("cuda", gpu)) for gpu in gpus)

    def load(self, files: Files) -> Engine:
        """Return an engine. Raises ValueError for a bad checkpoint, and for options that do not fit it."""
        engine = Engine.from_pretrained(
            files.model, dtype=self._torch_dtype, device=self.device, options=self._options(files), seed=None
        )
        self._engines.add(engine)
        return engine

    def check(self, engine: Engine, files: Files) -> EngineInfo:
        """Return what is known of an engine that passes the gate. Raises GateError."""
        loss = gate.check(engine, self.gate_timeout_s)
        template = None if engine.tokenizer is None else engine.tokenizer.chat_template
        written = files.model if files.model.is_file() else files.model / "config.json"
        return EngineInfo(
            created=int(written.stat().st_mtime),
            max_model_len=engine.max_seq_len,
            parameters=engine.config.num_parameters(),
            device=self.device,
            loss=loss,
            chat_template="plain" if template is None else "from the checkpoint",
        )

    def _taken_bytes(self) -> int:
        """Return what this process and its engines have, also the part of their caches that was never written."""
        stats = [engine.stats for engine in self._engines]
        own = self._own_bytes + sum(s.weight_bytes + s.kv_cache_bytes for s in stats)
        return max(own, resident_bytes())

    @property
    def _torch_dtype(self) -> torch.dtype | None:
        return getattr(torch, self.dtype) if self.dtype else None

    def _options(self, files: Files) -> EngineOptions:
        return self.options if files.draft is None else replace(self.options, draft_model=str(files.draft))


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3g} GiB"
