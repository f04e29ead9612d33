"""The settings of a run that belong to the cluster, the storage and the registry."""

from __future__ import annotations

from dataclasses import dataclass

from llama_ray.tracking.registry import Policy, check_name


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where a run happens, where it stores its checkpoints, and what becomes of its model.

    Args:
        world_size: Number of workers: one GPU each, or one CPU each on a cluster without GPUs. A range such as 2..8
            trains on as many workers as the cluster has room for, and follows as nodes come and go; the global batch
            stays that of the largest number.
        output_dir: Directory or URI that every node can reach; each run has a directory of its own in it.
        run_name: Name of that directory and of the MLflow run; by default the model's size and the time.
        resume: Name of a run in output_dir to continue; 'latest' is the one that saved last.
        experiment: MLflow experiment that the run belongs to.
        register_as: Name to register the finished model under; an empty name registers nothing.
        promote: When the alias 'champion' moves to the new version. if_better compares validation losses on the same
            data.
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
    max_failures: int = 3
    resize_interval_s: float = 60.0

    def __post_init__(self) -> None:
        least, most = self.workers
        if not 1 <= least <= most:
            raise ValueError(_bad_world_size(self.world_size))
        if self.register_as:
            check_name(self.register_as)
        if self.promote not in ("if_better", "always", "never"):
            raise ValueError(f"promote is {self.promote!r}; choose if_better, always or never")
        if self.max_failures < 0:
            raise ValueError(f"max_failures is {self.max_failures}; it must be at least 0")
        if self.run_name and self.resume:
            raise ValueError("run_name and resume are both given; --resume NAME already names the run")

    @property
    def workers(self) -> tuple[int, int]:
        """The smallest and the largest number of workers. Raises ValueError."""
        try:
            least, _, most = str(self.world_size).partition("..")
            return int(least), int(most or least)
        except ValueError:
            raise ValueError(_bad_world_size(self.world_size)) from None


def _bad_world_size(world_size: int | str) -> str:
    return f"world_size is {world_size}; it must be a number from 1 up, or a range such as 2..8"
