"""The device of each worker, checked before the workers make torch's process group."""

from __future__ import annotations

import socket

import ray
import torch
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import BackendConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from llama_ray.training.errors import TrainingError


class CheckedTorchConfig(TorchConfig):
    """Makes a process group of workers that can use their devices; else the start ends with TrainingError."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """See `BackendConfig`."""
        return _CheckedBackend


class _CheckedBackend(_TorchBackend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        worker_group.execute(_check_device)
        assert isinstance(backend_config, TorchConfig)
        super().on_start(worker_group, backend_config)


def _check_device() -> None:
    if ray.get_runtime_context().get_accelerator_ids()["GPU"] and not torch.cuda.is_available():
        raise TrainingError(
            f"a worker on {socket.gethostname()} has a GPU, but torch {torch.__version__} finds no CUDA there; "
            "install torch for the node's CUDA driver, or start the node with --num-gpus 0"
        )
