"""Load the engine of a version: what it takes from the registry, and whether there is memory for it."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from llama_ray.generation.engine import Engine
from llama_ray.generation.options import EngineOptions
from llama_ray.storage.paths import is_model_ref
from llama_ray.tracking import registry
from serve_app.registry.messages import EngineInfo, ModelVersion
from serve_app.replica import gate

DType = Literal["float32", "bfloat16", "float16"]
DEFAULT_OPTIONS = EngineOptions(max_num_seqs=16)

MAKE_ROOM = "lower kv_cache_memory_bytes or max_num_seqs so that two engines fit, or let new replicas replace old ones"


class TooLargeError(Exception):
    """There is no memory for an engine beside what is loaded; the message is one line with the way out."""


@dataclass(frozen=True)
class Files:
    """Where a version's model, and the model that drafts for it, are on this machine."""

    model: Path
    draft: Path | None = None


@dataclass(frozen=True)
class EngineLoader:
    """Makes the engines of a replica, all with the same options.

    References are resolved in the MLflow registry at `tracking_uri`. `dtype` None keeps the stored one. A version that
    has not answered the gate's prompt within `gate_timeout_s` fails.
    """

    tracking_uri: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: DType | None = None
    options: EngineOptions = DEFAULT_OPTIONS
    gate_timeout_s: float = 60.0

    def fetch(self, version: ModelVersion) -> Files:
        """Download what is not on this machine yet. Raises TrackingError."""
        draft = self.options.draft_model
        return Files(self._local(version.location), None if draft is None else self._local(draft))

    def _local(self, ref: str) -> Path:
        return registry.download(ref, self.tracking_uri) if is_model_ref(ref) else Path(ref)

    def load(self, files: Files) -> Engine:
        """Return an engine. Raises TooLargeError before anything is loaded, ValueError for a bad checkpoint."""
        options = self.options
        if files.draft is not None:
            options = replace(options, draft_model=str(files.draft))
        return Engine.from_pretrained(
            files.model,
            dtype=self.dtype and getattr(torch, self.dtype),
            device=self.device,
            options=options,
            seed=None,
        )

    def check(self, engine: Engine, files: Files) -> EngineInfo:
        """Return what is known of an engine that passes the gate. Raises GateError."""
        loss = gate.check(engine, self.gate_timeout_s)
        return EngineInfo(
            created=int((files.model / "config.json").stat().st_mtime),
            max_model_len=engine.max_seq_len,
            parameters=engine.config.num_parameters(),
            device=self.device,
            loss=loss,
        )


def give_back_memory() -> None:
    """Free what nothing refers to any more, also the memory that torch keeps for its next tensors.

    In a replica this takes little time, because Ray Serve has excluded from collections what was there at its start.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
