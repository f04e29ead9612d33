"""What a batch job is told, and what of it decides the answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama_ray.generation.options import EngineOptions
from llama_ray.generation.sampling.params import SamplingParams

_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


class BatchError(ValueError):
    """A job that cannot start or go on; the message is one line with the way out."""


@dataclass(frozen=True)
class BatchConfig:
    """What to answer, with what, and where to.

    Args:
        checkpoint: A directory that all nodes can read, models:/name/version or models:/name@alias.
        input: A .jsonl file, a folder or glob of them, or a URI that pyarrow reads. Absolute.
        output: The .jsonl file to write, a path on storage that all nodes share or a URI. Absolute.
        params: What every row asks for; a row's `sampling_params` replace single values. Its seed is not used.
        seed: Rows without a seed of their own get one from this and their number. None draws one and keeps it.
        prompt_field: The field that holds a row's text.
        replicas: Engines, each with a GPU, or with one CPU of Ray's count; None takes all GPUs, or one for each node.
        device: cpu or cuda, and for a single prompt also cuda:N; None takes GPUs if there are any.
        dtype: Compute in this type; None keeps the stored one.
        engine: Options of each engine; one with `tensor_parallel` N takes N GPUs.
        overwrite: Replace what `output` already holds.
    """

    checkpoint: str
    input: str
    output: str
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None
    prompt_field: str = "prompt"
    replicas: int | None = None
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.device not in (None, "cpu", "cuda"):
            raise BatchError(
                f"device is {self.device!r}; with an input file it must be cpu or cuda: Ray picks the GPU"
            )
        if self.replicas is not None and self.replicas < 1:
            raise BatchError(f"replicas is {self.replicas}; it must be at least 1")

    def made_from(self, rows: str, model: str, seed: int) -> dict[str, Any]:
        """Name -> value of all that the answers depend on, as JSON gives it back; replicas and the like are not in it.

        `rows` and `model` are fingerprints of the input and of the checkpoint.
        """
        params = {f.name: getattr(self.params, f.name) for f in dataclasses.fields(self.params)}
        decides = {
            "input": rows,
            "checkpoint": model,
            "prompt_field": self.prompt_field,
            "dtype": self.dtype,
            "quantization": self.engine.quantization,
            "tensor_parallel": self.engine.tensor_parallel,
            "batch_invariant": self.engine.batch_invariant,
            **params,
            "seed": seed,
        }
        return json.loads(json.dumps(decides))  # type: ignore[no-any-return]


def fingerprint(directory: Path) -> str:
    """Tells checkpoints apart by the names, lengths and samples of their files; the place does not count.

    Samples, since to read all of a large model takes minutes; a training step changes every one of them.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in directory.iterdir() if path.suffix in (".json", ".safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\n".encode())
        with file.open("rb") as f:
            for sample in range(_SAMPLES):
                f.seek(size * sample // _SAMPLES)
                digest.update(f.read(_SAMPLE_BYTES))
    return digest.hexdigest()
