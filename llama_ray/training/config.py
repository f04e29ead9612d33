"""The configuration of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from llama_ray.data.dataset.info import Task
from llama_ray.data.dataset.locations import DEFAULT_CACHE_BYTES
from llama_ray.data.mixtures.stages import Stage
from llama_ray.data.mixtures.timetable import Timetable
from llama_ray.model.config import LlamaConfig
from llama_ray.model.lora_config import TARGETS, LoraConfig
from llama_ray.utils.errors import printable
from llama_ray.utils.fields import check_fields, limits, shown
from llama_ray.utils.redact import redact

Precision = Literal["bf16", "fp16", "fp32", "fp8"]
Parallelism = Literal["auto", "ddp", "fsdp", "hsdp"]
ActivationCheckpointing = Literal["none", "selective", "full"]
OptimizerName = Literal["adamw", "muon"]
ScheduleName = Literal["cosine", "linear", "wsd"]
LEARNING_RATES: Mapping[Task, float] = {"pretrain": 3e-4, "sft": 2e-5, "dpo": 1e-6}
"""The learning rate of each task where none is given."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained: how long, on how much at once, and with which methods.

    A value that cannot work raises ValueError.

    Args:
        task: pretrain on text; sft (supervised fine-tuning) on conversations, whose answers alone the loss counts; or
            dpo: prefer one of two answers (Rafailov et al. 2023, arXiv:2305.18290). The data must be prepared for it.
        init_from: Weights to begin with instead of random ones: a directory, a .gguf file, hf://ORG/NAME, a training
            checkpoint, or models:/NAME/VERSION.
        branch_from: A checkpoint of another run to go on from in a run of its own: with its weights, its optimizer and
            its position in the data, and with a new schedule of `max_steps` more steps, by default without a warm-up.
        resize_vocab: Whether the vocabulary of `init_from` may grow to that of the data; new rows begin as the mean of
            the others.
        lora_rank: Train low-rank adapters of this rank beside the frozen weights of `init_from` (Hu et al. 2021,
            arXiv:2106.09685); 0 trains the weights themselves.
        lora_alpha: Scale of the adapters: their product is multiplied by `lora_alpha` / `lora_rank`; by default twice
            the rank.
        lora_dropout: Probability of dropout at the adapters' inputs.
        lora_targets: The linear layers that get adapters; by default all of the blocks.
        lora_rslora: Divide `lora_alpha` by the square root of the rank (Kalajdzievski 2023, arXiv:2312.03732).
        dpo_beta: How closely dpo holds the model to its reference; larger is closer.
        dpo_length_normalize: Whether dpo divides the log-probability of an answer by its number of tokens.
        epochs: Passes over the training split; of a mixture, as many windows as its sources hold together. `max_steps`
            overrides it.
        max_steps: Optimizer steps of the run.
        batch_size: Sequences per worker and micro-step.
        gradient_accumulation_steps: Micro-steps per optimizer step; ddp exchanges gradients in the last one only.
        seq_len: Tokens per sequence; 0 means the model's max_seq_len.
        stages: What changes at given steps: the weights of the sources, seq_len (to shorter sequences; micro-batches
            then hold more of them, up to the same number of tokens) and the tokens of the global batch.
        max_repetitions: How often, at most, the run may go through any source; 0 sets no limit.
        precision: Number format of matrix products: bf16 or fp16 (with a gradient scaler) by autocast, fp32, or fp8:
            float8 with a scale a tensor in the blocks' projections and bf16 elsewhere, on GPUs that have float8 units.
            Weights and optimizer state are fp32 in all of them.
        learning_rate: The highest learning rate, reached after the warm-up; by default 3e-4 for pretrain, 2e-5 for sft
            and 1e-6 for dpo, and ten times as much for adapters in the latter two.
        min_learning_rate_ratio: The learning rate at the end of the schedule, as a share of `learning_rate`.
        warmup_steps: Steps of linear warm-up, at most those of the run; by default a tenth of them, at most 2000.
        schedule: How the learning rate falls after the warm-up: cosine, linear, or wsd (warm-up, stable, decay), which
            is constant until the last `decay_fraction` of the run and then linear.
        decay_fraction: The share of all steps in which wsd decays.
        optimizer: adamw, or muon: Muon for the matrices of the blocks, AdamW for embeddings, head and norms.
        weight_decay: Decoupled weight decay, on matrices only.
        beta1: AdamW's decay rate of the gradient average.
        beta2: AdamW's decay rate of the squared gradient average.
        max_grad_norm: Global norm that gradients are clipped to; 0 switches clipping off.
        z_loss: Weight of the squared log of the softmax normaliser, added to each target's loss; keeps logits small.
            1e-4 in PaLM; 0 switches it off. Validation never includes it.
        max_skipped_steps: The run stops after this number of consecutive steps with a loss or gradient that is not
            finite. The updates of such steps are skipped.
        parallelism: ddp: every worker holds the whole model. fsdp: parameters, gradients and optimizer state are
            sharded over all workers. hsdp: sharded over `fsdp_size` workers and replicated to each such group. auto
            chooses by model size, device memory and number of workers.
        tensor_parallel: Workers that share every layer, each with a slice of its matrices; they see the same data.
            1 switches it off. Keep it within a node.
        fsdp_size: Workers that one replica of the model is sharded over under hsdp; 0 means those of one node.
        activation_checkpointing: Which activations are recomputed in the backward pass, to save memory: none,
            selective (every second matrix product, and everything that is cheap), or full (whole blocks).
        document_mask: Whether positions see their own document only, of which a row may hold many. All data know where
            theirs begin.
        data_cache_bytes: Bytes of the shards of data in object stores that a machine keeps in ~/.cache/llama_ray/data,
            for all its workers; 0 fetches everything each time it is needed.
        log_every: Steps between two logged points.
        validate_every: Steps between two validations; by default one epoch. The last step always validates.
        validation_batches: Batches per validation, over all workers; 0 means the whole split.
        checkpoint_every: Steps between two checkpoints; by default one epoch. The last step always saves.
        keep_checkpoints: The newest checkpoints that are kept; the one with the best validation loss is kept as well.
        checkpoint_copies_mib: Limit of the host memory for checkpoint data that is copied and not written yet, in MiB
            per worker; at the limit training waits for the disk. By default 512 on a CPU. On a GPU there is no limit by
            default: the copy of the worker's whole state is pinned once and kept.
        compile: torch.compile the blocks; by default on a GPU, and on a CPU if the run is long enough to save more time
            than compiling takes.
        profile_steps: Steps to record with the torch profiler, after the first three; 0 records none.
        collective_timeout_s: Seconds that workers wait for each other before the run counts as hung.
        seed: Seed of the initial weights and of the order of the data.
        allow_other_data: Whether a run may resume with other data, another seq_len or another seed than those of its
            checkpoint; it then begins a first epoch of them, and `epochs` counts from there.
    """

    task: Task = "pretrain"
    init_from: str | None = None
    branch_from: str | None = None
    resize_vocab: bool = False
    lora_rank: int = field(default=0, metadata=limits(0, 1024))
    lora_alpha: float | None = field(default=None, metadata=limits(above=0))
    lora_dropout: float = field(default=0.0, metadata=limits(0, below=1))
    lora_targets: tuple[str, ...] = ()
    lora_rslora: bool = False
    dpo_beta: float = field(default=0.1, metadata=limits(above=0))
    dpo_length_normalize: bool = False
    epochs: int = field(default=1, metadata=limits(1))
    max_steps: int | None = field(default=None, metadata=limits(1))
    batch_size: int = field(default=8, metadata=limits(1))
    gradient_accumulation_steps: int = field(default=1, metadata=limits(1))
    seq_len: int = field(default=0, metadata=limits(0))
    stages: tuple[Stage, ...] = ()
    max_repetitions: float = field(default=0.0, metadata=limits(0))
    precision: Precision = "bf16"
    learning_rate: float | None = field(default=None, metadata=limits(above=0))
    min_learning_rate_ratio: float = field(default=0.1, metadata=limits(0, 1))
    warmup_steps: int | None = field(default=None, metadata=limits(0))
    schedule: ScheduleName = "cosine"
    decay_fraction: float = field(default=0.2, metadata=limits(0, 1))
    optimizer: OptimizerName = "adamw"
    weight_decay: float = field(default=0.1, metadata=limits(0))
    beta1: float = field(default=0.9, metadata=limits(0, below=1))
    beta2: float = field(default=0.95, metadata=limits(0, below=1))
    max_grad_norm: float = field(default=1.0, metadata=limits(0))
    z_loss: float = field(default=0.0, metadata=limits(0))
    max_skipped_steps: int = field(default=10, metadata=limits(1))
    parallelism: Parallelism = "auto"
    tensor_parallel: int = field(default=1, metadata=limits(1))
    fsdp_size: int = field(default=0, metadata=limits(0))
    activation_checkpointing: ActivationCheckpointing = "none"
    document_mask: bool = True
    data_cache_bytes: int = field(default=DEFAULT_CACHE_BYTES, metadata=limits(0, 2**63 - 1))
    log_every: int = field(default=10, metadata=limits(1))
    validate_every: int | None = field(default=None, metadata=limits(1))
    validation_batches: int = field(default=50, metadata=limits(0))
    checkpoint_every: int | None = field(default=None, metadata=limits(1))
    keep_checkpoints: int = field(default=3, metadata=limits(1))
    checkpoint_copies_mib: int | None = field(default=None, metadata=limits(64))
    compile: bool | None = None
    profile_steps: int = field(default=0, metadata=limits(0, 1000))
    collective_timeout_s: int = field(default=600, metadata=limits(1))
    seed: int = field(default=0, metadata=limits(0, 2**63 - 1))
    allow_other_data: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.branch_from is not None:
            self._check_branch()
        if self.resize_vocab and self.init_from is None:
            raise ValueError(
                "resize_vocab is true; only the vocabulary of a model can grow; give it with --init_from REF"
            )
        self._check_lora()
        self._check_task()
        if self.fsdp_size and self.parallelism != "hsdp":
            raise ValueError(
                f"fsdp_size is {self.fsdp_size}; it must be 0 with parallelism {self.parallelism}; "
                "drop it or choose hsdp"
            )
        if self.precision == "fp8" and self.tensor_parallel > 1:
            raise ValueError(
                f"tensor_parallel is {self.tensor_parallel}; it must be 1 with precision fp8; use bf16, or fsdp alone"
            )

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or its default for the task."""
        if self.learning_rate is not None:
            return self.learning_rate
        # Of adapters (https://thinkingmachines.ai/blog/lora) about ten times that of all weights.
        adapters = 10 if self.lora_rank and self.task != "pretrain" else 1
        return adapters * LEARNING_RATES[self.task]

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters to train, or None to train the weights themselves."""
        if not self.lora_rank:
            return None
        return LoraConfig(
            rank=self.lora_rank,
            alpha=2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha,
            dropout=self.lora_dropout,
            targets=self.lora_targets or TARGETS,
            rslora=self.lora_rslora,
        )

    def flops_per_token(self, model: LlamaConfig, seq_len: int) -> int:
        """Floating point operations a token in training `model`, see `LlamaConfig` and `LoraConfig`."""
        lora = self.lora
        return lora.flops_per_token(model, seq_len) if lora else model.flops_per_token(seq_len)

    def _check_task(self) -> None:
        """Raise ValueError for a task that lacks what it needs, and for settings that it makes no use of."""
        if self.task != "pretrain" and self.parent is None:
            raise ValueError(f"task is {self.task}; it needs a model to tune; give it with --init_from REF")
        if self.task != "dpo":
            for name in ("dpo_beta", "dpo_length_normalize"):
                if (value := getattr(self, name)) != getattr(type(self), name):
                    raise ValueError(
                        f"{name} is {shown(value)}; it has an effect on task dpo only; leave it out, or give --task dpo"
                    )
            return
        if self.tensor_parallel > 1:
            raise ValueError(
                f"tensor_parallel is {self.tensor_parallel}; it must be 1 with task dpo; use fsdp"
            )
        if self.z_loss:
            raise ValueError(f"z_loss is {self.z_loss}; it must be 0 with task dpo; drop it")

    def _check_lora(self) -> None:
        """Raise ValueError for adapters that cannot be trained so, and for their settings without any."""
        if not self.lora_rank:
            # The names and defaults of fields are the class' own attributes.
            for name in ("lora_alpha", "lora_dropout", "lora_targets", "lora_rslora"):
                value = getattr(self, name)
                if value != getattr(type(self), name):
                    raise ValueError(
                        f"{name} is {shown(value)}; it is a setting of adapters; give --lora_rank, or leave it out"
                    )
            return
        if self.parent is None:
            raise ValueError(
                f"lora_rank is {self.lora_rank}; adapters need a model to adapt; give it with --init_from REF"
            )
        if self.init_from is not None and (shown_ref := redact(self.init_from)) != self.init_from:
            raise ValueError(
                f"init_from is {printable(shown_ref)}, with secrets; adapters name their base wherever they are kept; "
                "give credentials in the environment"
            )
        others = {"tensor_parallel": 1, "optimizer": "adamw", "resize_vocab": False}
        for name, value in others.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)}; with lora_rank it must be {value}")
        if self.precision == "fp8":
            raise ValueError("precision is fp8; with lora_rank it must be bf16, fp16 or fp32")
        # It checks the rest.
        _ = self.lora

    @property
    def parent(self) -> str | None:
        """What the run begins with; None for random weights."""
        return self.init_from or self.branch_from

    def _check_branch(self) -> None:
        if self.init_from is not None:
            raise ValueError(
                "init_from and branch_from are both given; branch_from takes the optimizer and the position in the "
                "data along, init_from the weights alone; leave out one of them"
            )
        if self.max_steps is None:
            raise ValueError(
                "max_steps is None; a branch has a schedule of its own; give the number of its steps with --max_steps N"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values only, as YAML and MLflow hold them."""
        return asdict(self) | {"learning_rate": self.peak_learning_rate}


@dataclass(frozen=True)
class Schedule:
    """How many steps a run has, and at which ones something happens: `TrainConfig` for data of a known size.

    Steps are counted from 1, whatever their global batches were. Epochs are counted in the data, so a run that resumed
    with another global batch still ends after `epochs` passes.
    """

    total_steps: int
    warmup_steps: int
    log_every: int
    validate_every: int | None
    """None is the step in which an epoch ends, as in `checkpoint_every`."""
    checkpoint_every: int | None
    in_epochs: bool
    """Whether the length of the run is given in epochs."""
    timetable: Timetable
    windows_per_epoch: int
    lead: int
    """Steps taken beyond those that `timetable` needs for the position in the data: not 0 after a change of them."""
    branched_at: int = 0
    """The step of another run that this one goes on from; the learning rate counts from there."""

    @classmethod
    def of(
        cls, config: TrainConfig, timetable: Timetable, windows_per_epoch: int, branched_at: int = 0
    ) -> Schedule:
        """Resolve what in `config` depends on the data: how many windows an epoch has, and a step takes.

        The `max_steps` of a branch come after the `branched_at` steps of the run that it goes on from.

        Raises ValueError for epochs that are shorter than a step, and for a warm-up that is longer than the run.
        """
        windows = config.epochs * windows_per_epoch
        undisturbed = Timetable(timetable.segments)
        length = config.max_steps or undisturbed.steps_within(windows)
        if length == 0:
            raise ValueError(
                f"epochs is {config.epochs}, which are {windows:,} windows; one step takes "
                f"{timetable.segments[0].windows:,}; lower batch_size or gradient_accumulation_steps, or use more data"
            )
        default = 0 if branched_at else min(length // 10, 2000)
        warmup = default if config.warmup_steps is None else config.warmup_steps
        if warmup > length:
            raise ValueError(
                f"warmup_steps is {warmup}; it must be at most {length}, the steps of the run, or learning_rate is "
                "never reached; lower it, or leave it out for a tenth of them"
            )
        return cls(
            total_steps=branched_at + config.max_steps
            if config.max_steps
            else timetable.steps_within(windows),
            warmup_steps=warmup,
            log_every=config.log_every,
            validate_every=config.validate_every,
            checkpoint_every=config.checkpoint_every,
            in_epochs=config.max_steps is None,
            timetable=timetable,
            windows_per_epoch=windows_per_epoch,
            lead=timetable.step - undisturbed.steps_within(timetable.position),
            branched_at=branched_at,
        )

    def logs(self, step: int) -> bool:
        """Return whether `step` is a point of the training curve."""
        return step % self.log_every == 0 or step in (1, self.total_steps)

    def validates(self, step: int) -> bool:
        """Return whether `step` ends with a validation."""
        return self._is_due(step, self.validate_every)

    def saves(self, step: int) -> bool:
        """Return whether `step` ends with a checkpoint."""
        return self._is_due(step, self.checkpoint_every)

    def progress(self, step: int) -> tuple[int, int]:
        """Return (step, steps of the run) as the learning rate counts them.

        If the run's length is given in epochs, these are steps of today's global batches from the beginning of the
        data, so that the rate is a function of the samples trained on; else those of a branch begin where it did.
        """
        lead = self.lead if self.in_epochs else self.branched_at
        return step - lead, self.total_steps - lead

    def _is_due(self, step: int, every: int | None) -> bool:
        if step == self.total_steps:
            return True
        return step % every == 0 if every else self._ends_an_epoch(step)

    def _ends_an_epoch(self, step: int) -> bool:
        before, after = (self.timetable.position_after(s) // self.windows_per_epoch for s in (step - 1, step))
        return before < after
