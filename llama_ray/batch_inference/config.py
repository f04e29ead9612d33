"""The configuration of a batch job, and which of its values determine the answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama_ray.generation.options import EngineOptions
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.utils.errors import UserError
from llama_ray.utils.redact import RedactedRepr

_CHECKPOINT_FILES = (".json", ".safetensors", ".model", ".jinja", ".gguf")
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


class BatchError(UserError):
    """A job that cannot start or continue."""


@dataclass(frozen=True, repr=False)
class BatchConfig(RedactedRepr):
    """What to answer, with which model, and where the answers go.

    Args:
        checkpoint: A directory or .gguf file that all nodes can read, models:/name/version, models:/name@alias,
            hf://ORG/NAME, or a URI of a directory in an object store.
        input: A .jsonl file, a folder or glob of them, or a URI that pyarrow reads. Absolute.
        output: The .jsonl file to write, a path on storage that all nodes share or a URI. Absolute.
        params: Sampling parameters of every row; a row's `sampling_params` override single values. The seed is unused.
        seed: Determines the seeds of rows without their own. None draws one and keeps it for a restart.
        prompt_field: The field that holds a row's text.
        replicas: Number of engines, each with a GPU or with one of Ray's CPUs. None: one per GPU, or one per node.
        device: cpu or cuda, and for a single prompt also cuda:N; None uses GPUs if the cluster has them.
        dtype: Compute in this type; None keeps the stored one.
        engine: Options of each engine; a replica uses `tensor_parallel` GPUs.
        adapters: LoRA adapters that a row may name in its field `adapter`: references by name.
        overwrite: Replace an existing `output`.
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
    adapters: dict[str, str] = field(default_factory=dict)
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.device not in (None, "cpu", "cuda"):
            raise BatchError(
                f"device is {self.device!r}; with an input file it must be cpu or cuda; Ray picks the GPU"
            )
        if self.adapters and self.engine.tensor_parallel > 1:
            raise BatchError(
                f"tensor_parallel is {self.engine.tensor_parallel}; it must be 1 with adapters; set it, or give one of "
                "the adapters as checkpoint, which is then merged"
            )
        if self.replicas is not None and self.replicas < 1:
            raise BatchError(f"replicas is {self.replicas}; it must be at least 1")

    def made_from(
        self, input_fingerprint: str, checkpoint_fingerprint: str, adapters: dict[str, str], seed: int
    ) -> dict[str, Any]:
        """Return name -> value, as JSON holds it, of everything that determines the answers.

        The number of replicas, their device and the like are not among it. `adapters` are fingerprints by name.
        """
        params = {f.name: getattr(self.params, f.name) for f in dataclasses.fields(self.params)}
        values = {
            "input": input_fingerprint,
            "checkpoint": checkpoint_fingerprint,
            "prompt_field": self.prompt_field,
            "dtype": self.dtype,
            "quantization": self.engine.quantization,
            "tensor_parallel": self.engine.tensor_parallel,
            "batch_invariant": self.engine.batch_invariant,
            **params,
            "seed": seed,
            **({"adapters": adapters} if adapters else {}),
        }
        return json.loads(json.dumps(values))  # type: ignore[no-any-return]


def checkpoint_fingerprint(checkpoint: Path) -> str:
    """Return a digest of the names, sizes and samples of the files of a checkpoint, which may be one file.

    Its location does not matter.

    Samples, because reading all of a large model takes minutes; a training step changes every one of them.
    """
    digest = hashlib.sha256()
    files = [checkpoint] if checkpoint.is_file() else sorted(checkpoint.iterdir())
    for file in (file for file in files if file.suffix in _CHECKPOINT_FILES):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\n".encode())
        with file.open("rb") as stream:
            for sample in range(_SAMPLES):
                stream.seek(size * sample // _SAMPLES)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
