"""The settings of a run that belong to the cluster, the storage and the registry."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from llama_ray.evaluation.promotion import Rule
from llama_ray.tracking.registry import Policy, check_name
from llama_ray.utils.fields import Limits, check_fields, limits, shown
from llama_ray.utils.redact import RedactedRepr

_MAX_WORKERS = 2**17
"""More GPUs than any cluster has."""
LATEST = "latest"
"""What `resume` says for the run that saved last."""
IF_THERE = "if_there"
"""What `resume` says for the run of `run_name`, whether it has begun or not."""
_MAX_NAME_BYTES = 128
"""A file system has room for 255, and Ray Train and MLflow append to the name."""


@dataclass(frozen=True, kw_only=True, repr=False)
class LaunchConfig(RedactedRepr):
    """Where a run happens, where it stores its checkpoints, and what becomes of its model.

    Args:
        world_size: Number of workers: one GPU each, or one CPU each on a cluster without GPUs. A range such as 2..8
            trains on as many workers as the cluster has room for, and follows as nodes come and go; the global batch
            stays that of the largest number.
        output_dir: Directory or URI that every node can reach; each run has a directory of its own in it.
        run_name: Name of that directory and of the MLflow run: letters, digits, '-', '_' and '.'; by default the
            model's size, the time and a random number.
        resume: Name of a run in output_dir to continue; 'latest' is the one that saved last. if_there continues the run
            of run_name where output_dir has it, and starts it where not, so that the same command may be tried again.
        experiment: MLflow experiment that the run belongs to.
        register_as: Name to register the finished model under; an empty name registers nothing.
        promote: When the alias 'champion' moves to the new version. if_better compares validation losses on the same
            data.
        promote_if: A rule such as "bits_per_byte < champion" that takes the place of `promote`: the new version and the
            champion are evaluated in the same way, and the alias moves where it holds. METRIC <, <=, > or >= champion,
            champion + or - NUMBER, or NUMBER; several joined by `and`.
        evaluate_every: Steps between two evaluations of checkpoints, made beside the training, each at the first
            checkpoint from there on; the last checkpoint is always evaluated. By default none is.
        evaluate_tasks: What evaluations ask: tasks of lm-evaluation-harness, or none; by default the bundled ones, if
            lm_eval is installed.
        evaluate_text: Texts whose bits per byte evaluations measure, as NAME=SOURCE or SOURCE; by default the
            validation documents of the data.
        evaluate_limit: Documents of each task and text that an evaluation takes.
        evaluate_context: Tokens that a window of text holds; by default 2048 or, if that is less, the model's limit.
        max_failures: Restarts from the last checkpoint before the run counts as failed.
        resize_interval_s: Seconds between two checks whether a range of workers can grow or must shrink.
    """

    world_size: int | str = 1
    output_dir: str = "./checkpoints"
    run_name: str | None = None
    resume: str | None = None
    experiment: str = "llama-ray"
    register_as: str = "llama-ray"
    promote: Policy = "if_better"
    promote_if: str | None = None
    evaluate_every: int | None = field(default=None, metadata=limits(1))
    evaluate_tasks: tuple[str, ...] = ()
    evaluate_text: tuple[str, ...] = ()
    evaluate_limit: int = field(default=100, metadata=limits(1))
    evaluate_context: int | None = field(default=None, metadata=limits(1))
    max_failures: int = field(default=3, metadata=limits(0))
    resize_interval_s: float = field(default=60.0, metadata=limits(above=0, most=10**9))

    def __post_init__(self) -> None:
        check_fields(self)
        least, most = self.workers
        if not 1 <= least <= most:
            raise ValueError(_bad_world_size(self.world_size))
        Limits(most=_MAX_WORKERS).check("world_size", most, int)
        if self.register_as:
            check_name(self.register_as)
        if self.promote_if is not None:
            Rule.parse(self.promote_if)
            if not self.register_as:
                raise ValueError(
                    "promote_if is given without a version to promote; give --register_as NAME, or leave it out"
                )
        for flag, name in (("run_name", self.run_name), ("resume", self.resume)):
            if name is not None:
                _check_run_name(flag, name)
        if self.run_name in (LATEST, IF_THERE):
            raise ValueError(
                f"run_name is {self.run_name}, which means another run to --resume; give another name"
            )
        if self.resume == IF_THERE and not self.run_name:
            raise ValueError("resume is if_there; the run needs a name; give it with --run_name NAME")
        if self.run_name and self.resume not in (None, IF_THERE):
            raise ValueError("run_name and resume are both given; --resume NAME already names the run")

    @property
    def workers(self) -> tuple[int, int]:
        """The smallest and the largest number of workers. Raises ValueError."""
        try:
            least, _, most = str(self.world_size).partition("..")
            return int(least), int(most or least)
        except ValueError:
            raise ValueError(_bad_world_size(self.world_size)) from None


def _check_run_name(flag: str, name: str) -> None:
    """Raise ValueError unless `name` names one directory, on any storage and in one line."""
    if not re.fullmatch(r"\w([\w.-]*\w)?", name) or len(name.encode()) > _MAX_NAME_BYTES:
        raise ValueError(
            f"{flag} is {shown(name)}; it must be at most {_MAX_NAME_BYTES} bytes of letters, digits, '-', "
            "'_' and '.', without '-' and '.' at its ends; give another name"
        )


def _bad_world_size(world_size: int | str) -> str:
    text = shown(world_size).strip("'")
    return f"world_size is {text}; it must be a number from 1 up, or a range such as 2..8"
