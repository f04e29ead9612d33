"""What Ray Train costs: the same training loop on two workers under TorchTrainer and under torchrun, alternating.

    python benchmarks/ray_overhead.py    # 3 minutes on 2 cores

Each round is a whole run of each; start-up does not count. The lower quartile of the step times is compared, because
other work on the machine comes in bursts that lengthen some of the steps. Starts a local Ray for each run unless
RAY_ADDRESS is set.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import auto_cli

from llama_ray.data.dataset.batch import Batch
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.training.config import TrainConfig
from llama_ray.training.optimizers.build import build_optimizer
from llama_ray.training.parallel.layout import choose_layout
from llama_ray.training.parallel.parallelize import parallelize
from llama_ray.training.step import Stepper


def main(
    rounds: int = 3, steps: int = 150, preset: str = "llama-tiny", workers: int = 2, out: str = ""
) -> None:
    """Print the ratio of torchrun's step time to TorchTrainer's: 1 means that Ray costs nothing.

    Args:
        rounds: Runs of each.
        steps: Optimizer steps in a run.
        preset: A preset of LlamaConfig.
        workers: Processes, one thread each.
        out: Internal: the file to which rank 0 under torchrun writes its step times.
    """
    if out:
        dist.init_process_group("gloo")
        times = step_times(preset, steps)
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(times))
        dist.destroy_process_group()
        return
    ours, theirs = [], []
    for i in range(rounds):
        runs = [(theirs, under_torchrun), (ours, under_ray)]
        for times, run in runs if i % 2 else reversed(runs):
            times.append(statistics.quantiles(run(preset, steps, workers), n=4)[0])
        print(f"torchrun {theirs[-1] * 1e3:.1f} ms a step, TorchTrainer {ours[-1] * 1e3:.1f} ms", flush=True)
    ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    print(f"TorchTrainer reaches {ratio:.3f} of torchrun's rate")


def step_times(preset: str, steps: int) -> list[float]:
    """Return the seconds of each step on this worker, after three warm-up steps."""
    torch.set_num_threads(1)
    shape = LlamaConfig.preset(preset, max_seq_len=256)
    train = TrainConfig(parallelism="ddp")
    device = torch.device("cpu")
    layout = choose_layout(shape, train, dist.get_world_size())
    model = parallelize(Llama(shape, device="meta"), train, layout, device, compile_blocks=False)
    stepper = Stepper(model, build_optimizer(model, train), train, device=device, layout=layout)
    tokens = torch.zeros(8, 256, dtype=torch.int64)
    times = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        stepper.step([Batch(tokens, tokens)]).loss.item()
        times.append(time.perf_counter() - start)
    return times[3:]


def under_torchrun(preset: str, steps: int, workers: int) -> list[float]:
    """Return `step_times` of rank 0 of `workers` processes under torchrun."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "times.json"
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={workers}",
        ]
        flags = ["--preset", preset, "--steps", str(steps), "--out", str(out)]
        subprocess.run([*launch, __file__, *flags], check=True)
        times: list[float] = json.loads(out.read_text())
        return times


def under_ray(preset: str, steps: int, workers: int) -> list[float]:
    """Return `step_times` of rank 0 of `workers` workers under TorchTrainer."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    # By default Ray workers have niceness 15 and yield to other processes, which is not what is measured here.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(os.environ.get("RAY_ADDRESS", "local"), include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "times.json"
            TorchTrainer(
                _ray_worker,
                train_loop_config={"preset": preset, "steps": steps, "out": str(out)},
                scaling_config=ScalingConfig(num_workers=workers),
                run_config=RunConfig(storage_path=directory),
            ).fit()
            times: list[float] = json.loads(out.read_text())
            return times
    finally:
        ray.shutdown()


def _ray_worker(config: dict[str, Any]) -> None:
    times = step_times(config["preset"], config["steps"])
    if dist.get_rank() == 0:
        Path(config["out"]).write_text(json.dumps(times))


if __name__ == "__main__":
    auto_cli(main)
