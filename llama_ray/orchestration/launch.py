"""Where a run happens, where it keeps things, and what becomes of its model."""

from __future__ import annotations

from dataclasses import dataclass

from llama_ray.tracking.registry import Policy, check_name


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where a run happens, where it keeps things, and what becomes of its model.

    Args:
        world_size: Workers: one GPU each, or one CPU each on a cluster without GPUs. A range such as 2..8 trains
            with as many as there are and changes the number as nodes come and go; the global batch stays that of
            the largest.
        output_dir: Directory or URI, reachable from every node, that holds a directory for each run.
        run_name: Of the directory and the MLflow run; by default made from the model's size and the time.
        resume: Go on with the run of this name in output_dir; 'latest' is the one that saved last.
        experiment: The MLflow experiment that the run is part of.
        register_as: Name to register the finished model under; an empty one registers nothing.
        promote: When the alias 'champion' moves to the new version.
        max_failures: How often the workers are restarted from the last checkpoint before the run is given up.
        resize_interval_s: How often a range of workers is compared with what the cluster has, in seconds.
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
        if min(self.workers) < 1 or self.workers[0] > self.workers[1]:
            raise ValueError(
                f"world_size is {self.world_size}; give a number from 1, or a range such as 2..8"
            )
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
        """The fewest and the most workers. Raises ValueError."""
        try:
            least, _, most = str(self.world_size).partition("..")
            return int(least), int(most or least)
        except ValueError:
            raise ValueError(
                f"world_size is {self.world_size!r}; give a number from 1, or a range such as 2..8"
            ) from None
