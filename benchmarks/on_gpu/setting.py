"""On what, and with what shapes, all parts run."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_ray.model.config import LlamaConfig

PRESETS = {"134M": "llama-110m", "1.1B": "tinyllama-1.1b", "7B": "llama-2-7b"}


@dataclass(frozen=True)
class Setting:
    """The device, whether models are tiny (to try the script), and the directory of all output."""

    device_name: str
    tiny: bool
    out: Path

    @property
    def device(self) -> torch.device:
        """The device that everything runs on."""
        return torch.device(self.device_name)

    @property
    def on_gpu(self) -> bool:
        """Whether that is a GPU."""
        return self.device.type == "cuda"

    def config(self, name: str, max_seq_len: int) -> LlamaConfig:
        """Return the shape called `name` in `PRESETS` for sequences of `max_seq_len`; a tiny one if asked for."""
        preset = "llama-tiny" if self.tiny else PRESETS[name]
        return LlamaConfig.preset(preset, max_seq_len=max_seq_len)

    def size(self, value: int, tiny: int) -> int:
        """Return `value`, or `tiny` for a trial."""
        return tiny if self.tiny else value

    def problem(self) -> str | None:
        """Return why nothing can run, in one line, or None."""
        if self.on_gpu and not torch.cuda.is_available():
            return (
                "--device is cuda; torch finds no GPU here; --device cpu --tiny tries the script without one"
            )
        if not self.on_gpu and not self.tiny:
            return f"--device is {self.device_name}; the real shapes need a GPU; add --tiny"
        return None

    def machine(self) -> str:
        """Return the card and the versions, in one line."""
        card = torch.cuda.get_device_name(self.device) if self.on_gpu else f"CPU {platform.machine()}"
        import transformers

        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        if self.on_gpu:
            import triton

            versions["triton"] = triton.__version__
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        return f"{card}; Python {platform.python_version()}, {listed}" + (" (tiny models)" * self.tiny)
