"""What Ray Train costs: the same loop on two workers, started by TorchTrainer and by torchrun, in turns.

    python benchmarks/ray_overhead.py

Each turn is a whole run of some dozen steps; start-up is left out, and the time is compared that a quarter of the steps
stay below: the work of others on the machine comes in bursts, and lengthens the steps that it meets. Starts a local Ray
of its own for each turn unless RAY_ADDRESS says otherwise.
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
        rounds: Turns of each.
        steps: Optimizer steps in a turn.
        preset: A preset of LlamaConfig.
        workers: Processes, one thread each.
        out: Used by the benchmark itself: the file that a worker under torchrun writes to.
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
        turns = [(theirs, under_torchrun), (ours, under_ray)]
        for times, run in turns if i % 2 else reversed(turns):
            times.append(statistics.quantiles(run(preset, steps, workers), n=4)[0])
        print(f"torchrun {theirs[-1] * 1e3:.1f} ms a step, TorchTrainer {ours[-1] * 1e3:.1f} ms", flush=True)
    ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    print(f"TorchTrainer reaches {ratio:.3f} of torchrun's rate")


def step_times(preset: str, steps: int) -> list[float]:
    """Seconds of each step on this worker, after three that warm up."""
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
        stepper.step([(tokens, tokens)]).loss.item()
        times.append(time.perf_counter() - start)
    return times[3:]


def under_torchrun(preset: str, steps: int, workers: int) -> list[float]:
    """`step_times` of the first of `workers` processes."""
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
    """`step_times` of the first worker of a TorchTrainer."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    # Ray gives way to whatever else wants the cores (niceness 15), which is not what is measured here.
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


def _ray_worker(plan: dict[str, Any]) -> None:
    times = step_times(plan["preset"], plan["steps"])
    if dist.get_rank() == 0:
        Path(plan["out"]).write_text(json.dumps(times))


if __name__ == "__main__":
    auto_cli(main)
