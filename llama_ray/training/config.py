"""What a training run is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Precision = Literal["bf16", "fp16", "fp32"]
Parallelism = Literal["auto", "ddp", "fsdp", "hsdp"]
Checkpointing = Literal["none", "selective", "full"]
OptimizerName = Literal["adamw", "muon"]
ScheduleName = Literal["cosine", "linear", "wsd"]

_CHOICES = {
    "precision": ("bf16", "fp16", "fp32"),
    "parallelism": ("auto", "ddp", "fsdp", "hsdp"),
    "activation_checkpointing": ("none", "selective", "full"),
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "linear", "wsd"),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on how much at once, and how a model is trained. A value that cannot work raises ValueError.

    Args:
        epochs: Passes over the training split; `max_steps` replaces it where given.
        max_steps: Optimizer steps.
        batch_size: Sequences per worker and micro-step.
        gradient_accumulation_steps: Micro-steps per optimizer step; gradients are exchanged in the last one only.
        seq_len: Tokens per sequence; 0 means the model's max_seq_len.
        precision: Of matrix products: bf16 or fp16 (with a gradient scaler) by autocast, or fp32. Weights and
            optimizer state are fp32 in all three.
        learning_rate: The highest one, reached after the warm-up.
        min_learning_rate_ratio: Where the schedule ends, as a share of `learning_rate`.
        warmup_steps: Steps of linear warm-up; by default a tenth of the run, at most 2000.
        schedule: How the rate falls after the warm-up: along a cosine, along a line, or wsd (warm-up, stable, decay):
            flat until the last `decay_fraction` of the run, then along a line.
        decay_fraction: Of all steps, the share in which wsd decays.
        optimizer: adamw, or muon: Muon for the matrices of the blocks, AdamW for embeddings, head and norms.
        weight_decay: Decoupled, on matrices only.
        beta1: AdamW's decay of the gradient average.
        beta2: AdamW's decay of the squared gradient average.
        max_grad_norm: Global norm that gradients are clipped to; 0 switches clipping off.
        z_loss: Weight of the squared log of the softmax normaliser, added to each target's loss; keeps logits small.
            1e-4 in PaLM; 0 switches it off. Validation never includes it.
        max_skipped_steps: Consecutive steps with a loss or gradient that is not finite (their updates are left out)
            before the run stops.
        parallelism: ddp: every worker holds the whole model. fsdp: parameters, gradients and optimizer state are
            sharded over all workers. hsdp: sharded over `fsdp_size` workers and copied to each such group. auto
            picks by model size, device memory and number of workers.
        tensor_parallel: Workers that share every layer, each with a slice of its matrices; they see the same data.
            1 switches it off. Keep it within a node.
        fsdp_size: Workers that one copy of the model is sharded over under hsdp; 0 means those of one node.
        activation_checkpointing: Which activations are computed again in the backward pass, to save memory: none,
            selective (every second matrix product and all that is cheap), or full (whole blocks).
        log_every: Steps between two logged points.
        validate_every: Steps between two validations; by default each epoch. The last step always validates.
        validation_batches: Batches per validation, over all workers; 0 means the whole split.
        checkpoint_every: Steps between two checkpoints; by default each epoch. The last step always saves.
        keep_checkpoints: How many checkpoints stay on disk, newest first.
        checkpoint_copies_mib: Host memory for what a checkpoint has copied and not yet written, in MiB a worker; at
            its limit training waits for the disk. By default 512 on a CPU, and on a GPU all that the worker holds,
            pinned once and kept.
        compile: torch.compile the blocks; by default on a GPU only.
        profile_steps: Steps to record with the torch profiler after the first ones; 0 records none.
        collective_timeout_s: Seconds that workers wait for one another before the run counts as hung.
        seed: Of the initial weights and the order of the data.
    """

    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    seq_len: int = 0
    precision: Precision = "bf16"
    learning_rate: float = 3e-4
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int | None = None
    schedule: ScheduleName = "cosine"
    decay_fraction: float = 0.2
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    z_loss: float = 0.0
    max_skipped_steps: int = 10
    parallelism: Parallelism = "auto"
    tensor_parallel: int = 1
    fsdp_size: int = 0
    activation_checkpointing: Checkpointing = "none"
    log_every: int = 10
    validate_every: int | None = None
    validation_batches: int = 50
    checkpoint_every: int | None = None
    keep_checkpoints: int = 3
    checkpoint_copies_mib: int | None = None
    compile: bool | None = None
    profile_steps: int = 0
    collective_timeout_s: int = 600
    seed: int = 0

    def __post_init__(self) -> None:
        least = {
            "epochs": 1,
            "max_steps": 1,
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "seq_len": 0,
            "warmup_steps": 0,
            "weight_decay": 0,
            "max_grad_norm": 0,
            "z_loss": 0,
            "max_skipped_steps": 1,
            "tensor_parallel": 1,
            "fsdp_size": 0,
            "profile_steps": 0,
            "collective_timeout_s": 1,
            "log_every": 1,
            "validate_every": 1,
            "validation_batches": 0,
            "checkpoint_every": 1,
            "keep_checkpoints": 1,
            "checkpoint_copies_mib": 64,
            "seed": 0,
        }
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ValueError(f"{name} is {value}; it must be at least {limit}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        for name in ("min_learning_rate_ratio", "decay_fraction", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between 0 and 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose {listed}")
        if self.fsdp_size and self.parallelism != "hsdp":
            raise ValueError(
                f"fsdp_size {self.fsdp_size} is for parallelism hsdp, not {self.parallelism}; drop it or choose hsdp"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as YAML and MLflow hold them."""
        return asdict(self)


@dataclass(frozen=True)
class Schedule:
    """How long the run is and when something happens, in steps: `TrainConfig` once the size of the data is known."""

    total_steps: int
    warmup_steps: int
    validate_every: int
    checkpoint_every: int

    @classmethod
    def of(cls, config: TrainConfig, batches_per_epoch: int) -> Schedule:
        """Resolve the defaults that depend on how many global batches an epoch has."""
        total = config.max_steps or config.epochs * batches_per_epoch
        warmup = min(total // 10, 2000) if config.warmup_steps is None else config.warmup_steps
        return cls(
            total_steps=total,
            warmup_steps=warmup,
            validate_every=config.validate_every or batches_per_epoch,
            checkpoint_every=config.checkpoint_every or batches_per_epoch,
        )

    def validates(self, step: int) -> bool:
        """Whether `step` (counted from 1) ends with a validation."""
        return step % self.validate_every == 0 or step == self.total_steps

    def saves(self, step: int) -> bool:
        """Whether `step` (counted from 1) ends with a checkpoint."""
        return step % self.checkpoint_every == 0 or step == self.total_steps
