"""Will it fit, and how long will it take: ``python jobs/plan.py --preset llama-65b --gpus 64 --gpu_memory 80GiB``."""

from __future__ import annotations

import dataclasses

from _cli import main, parse, read_bytes
from jsonargparse import ArgumentParser

from llama_ray.model.config import PRESETS, LlamaConfig
from llama_ray.training.config import TrainConfig
from llama_ray.training.planning.plan import (
    FRAGMENTATION,
    RUNTIME_BYTES,
    Cluster,
    Plan,
    make_plan,
    nearest_that_fits,
)

GIB = 1024**3
CHANGEABLE = (
    "parallelism",
    "tensor_parallel",
    "activation_checkpointing",
    "batch_size",
    "gradient_accumulation_steps",
)
LINKS = ("gpus_per_node", "node_bandwidth", "network_bandwidth")
TRAINING = (*CHANGEABLE, "fsdp_size", "seq_len", "precision", "optimizer")


def run() -> None:
    """Reads the flags, traces the run on fake tensors, and prints what it needs."""
    flags = parse(_parser())
    overrides = {f.name: flags[f.name] for f in dataclasses.fields(LlamaConfig) if f.name in flags}
    model = LlamaConfig.preset(flags.preset, **{k: v for k, v in overrides.items() if v is not None})
    config = TrainConfig(**{name: flags[name] for name in TRAINING})
    cluster = Cluster(
        gpus=flags.gpus,
        gpu_memory_bytes=read_bytes(flags.gpu_memory, "gpu_memory"),
        gpu_flops=flags.gpu_flops,
        **{name: flags[name] for name in LINKS},
    )
    plan = make_plan(model, config, cluster, mfu=flags.mfu)
    print(
        f"{flags.preset}, {model.num_parameters():,} parameters, on {cluster.gpus} GPUs: {plan.layout.reason}"
    )
    _tell(plan, flags.tokens)
    if not plan.fits:
        other = nearest_that_fits(plan)
        if other is None:
            print("\nNothing near it fits; take GPUs with more memory.")
        else:
            print(f"\nThe nearest configuration that fits: {', '.join(changes(plan, other))}")
            _tell(other, flags.tokens)


def changes(plan: Plan, other: Plan) -> list[str]:
    """The flags that lead from one plan to the other."""
    changed = [
        f"--{name} {getattr(other.config, name)}"
        for name in CHANGEABLE
        if getattr(other.config, name) != getattr(plan.config, name)
    ]
    more = [f"--gpus {other.cluster.gpus}"] if other.cluster.gpus != plan.cluster.gpus else []
    return changed + more


def _tell(plan: Plan, tokens: float) -> None:
    verdict = "fits" if plan.fits else "does not fit"
    limit = plan.cluster.gpu_memory_bytes / GIB
    print(
        f"It {verdict}: {plan.needed_bytes / GIB:.1f} of {limit:.1f} GiB a GPU at the fullest moment of a step."
    )
    for kind, size in plan.memory.items():
        print(f"  {kind:15}{size / GIB:8.2f} GiB")
    lost = f"{FRAGMENTATION:.0%} lost between tensors, {RUNTIME_BYTES / GIB:.1f} GiB runtime"
    print(f"  {'assumed':15}{plan.needed_bytes / GIB - sum(plan.memory.values()) / GIB:8.2f} GiB ({lost})")
    layers = plan.model.num_layers
    if layers > 6:
        print(
            f"  (traced with 4 and with 6 layers; each of the other {layers - 6} adds what those two added)"
        )
    rate = f"{plan.mfu:.0%} of {plan.cluster.gpu_flops / 1e12:,.0f} TFLOP/s a GPU"
    print(
        f"A step of {plan.tokens_per_step:,} tokens takes {plan.step_s:.2f} s; {tokens:.3g} tokens take",
        end=" ",
    )
    print(f"{plan.days(tokens):,.1f} days.")
    print(f"  {'computing':15}{plan.compute_s:8.2f} s (assumed: {rate})")
    if plan.cluster.gpus > 1:
        reached = f"{plan.cluster.reached:.0%}"
        links = (
            f"{plan.cluster.node_bandwidth / 1e9:,.0f} and {plan.cluster.network_bandwidth / 1e9:,.0f} GB/s"
        )
        print(f"  {'meanwhile':15}{plan.overlapped_s:8.2f} s for parameters and gradients to travel")
        print(f"  {'waiting':15}{plan.waited_s:8.2f} s for tensor-parallel peers and in the update")
        print(f"  (assumed: {reached} of {links} a GPU within and between nodes)")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="plan.py", description="Says whether a training run fits, and how long it takes."
    )
    add = parser.add_argument
    add("--preset", required=True, help=f"The model's shape: one of {', '.join(PRESETS)}.")
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size"):
        add(f"--{name}", type=int | None, help="In place of the preset's.")
    add("--gpus", type=int, required=True, help="Workers, one GPU each.")
    add("--gpu_memory", type=str, required=True, help="Of one GPU, such as 80GiB.")
    add("--gpus_per_node", type=int, default=8, help="Tensor parallelism stays within a node.")
    add(
        "--gpu_flops",
        type=float,
        default=989e12,
        help="Dense FLOP/s of one GPU; the default is an H100's in bf16.",
    )
    add("--mfu", type=float, default=0.4, help="Share of that which computing is assumed to reach.")
    add(
        "--node_bandwidth",
        type=float,
        default=Cluster.node_bandwidth,
        help="Bytes/s of one GPU to others of its node, each way; the default is NVLink 4.",
    )
    add(
        "--network_bandwidth",
        type=float,
        default=Cluster.network_bandwidth,
        help="Bytes/s of one GPU's network adapter, each way; the default is 400 Gb/s.",
    )
    add("--tokens", type=float, default=1e12, help="How many tokens the run is to see.")
    parser.add_class_arguments(
        TrainConfig, skip={f.name for f in dataclasses.fields(TrainConfig) if f.name not in TRAINING}
    )
    parser.set_defaults(batch_size=1)
    return parser


if __name__ == "__main__":
    main(run)
