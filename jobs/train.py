"""Train a LLaMA on the cluster and register it: ``python jobs/train.py --data data/mine --preset llama-110m``."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import ray
from _cli import main, parse
from jsonargparse import ArgumentParser, Namespace

from llama_ray.data.prepare import PrepareConfig, prepare
from llama_ray.data.shards import read_info
from llama_ray.model.config import PRESETS, LlamaConfig, RopeScaling
from llama_ray.orchestration.launch import LaunchConfig
from llama_ray.orchestration.trainer import train_on_ray
from llama_ray.storage.paths import absolute, existing
from llama_ray.training.config import TrainConfig
from llama_ray.training.errors import TrainingError
from llama_ray.training.interrupt import Stopped

DEFAULT_PRESET = "llama-30m"


def run() -> None:
    """Reads the flags, connects to the cluster (RAY_ADDRESS, or a local one), trains and says what came of it."""
    flags = parse(_parser())
    config = TrainConfig(**_fields_of(TrainConfig, flags))
    launch = LaunchConfig(**_fields_of(LaunchConfig, flags))
    shape = _shape(flags)
    ray.init()
    data = existing(flags.data) if flags.data else _builtin(shape.vocab_size)
    if flags.vocab_size is None and flags.preset is None:
        shape = dataclasses.replace(shape, vocab_size=read_info(data).vocab_size)
    try:
        outcome = train_on_ray(shape, config, launch, data)
    except Stopped as stopped:
        print(stopped, flush=True)
        return
    except TrainingError as error:
        sys.exit(f"error: {error}")
    print(f"validation loss {outcome.validation_loss:.4f}; last checkpoint {outcome.checkpoint}", flush=True)
    if outcome.version and outcome.decision:
        print(f"registered {outcome.version.uri}; {outcome.decision.reason}", flush=True)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="train.py",
        description="Trains a LLaMA on a Ray cluster, tracks the run in MLflow and registers the model.",
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with any of these flags; flags override it."
    )
    parser.add_argument(
        "--data",
        type=str | None,
        help="A directory from prepare_data.py; by default one made from the builtin corpus.",
    )
    parser.add_argument(
        "--preset",
        type=str | None,
        help=f"The model's shape: one of {', '.join(PRESETS)}. Single sizes below replace the preset's. "
        f"Without a preset: {DEFAULT_PRESET}'s sizes and the vocabulary of the data.",
    )
    for field in dataclasses.fields(LlamaConfig):
        parser.add_argument(f"--{field.name}", type=_SHAPE_TYPES.get(field.name, int) | None)
    parser.add_class_arguments(TrainConfig)
    parser.add_class_arguments(LaunchConfig, skip={"resume"})
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        type=str | None,
        help="Go on with the run of this name in output_dir; without a name, with the one that saved last.",
    )
    return parser


_SHAPE_TYPES: dict[str, Any] = {
    "rope_theta": float,
    "norm_eps": float,
    "tie_embeddings": bool,
    "rope_scaling": RopeScaling,
}


def _fields_of(kind: type, flags: Namespace) -> dict[str, Any]:
    return {field.name: flags[field.name] for field in dataclasses.fields(kind)}


def _shape(flags: Namespace) -> LlamaConfig:
    given = {k: v for k, v in _fields_of(LlamaConfig, flags).items() if v is not None}
    if scaling := given.get("rope_scaling"):
        given["rope_scaling"] = RopeScaling(**vars(scaling))
    return LlamaConfig.preset(flags.preset or DEFAULT_PRESET, **given)


def _builtin(vocab_size: int) -> str:
    """The prepared builtin corpus with this vocabulary, made on first use."""
    output = absolute(f"data/builtin-{vocab_size}")
    prepare(
        PrepareConfig(source="builtin", output=output, vocab_size=vocab_size),
        log=lambda line: print(line, flush=True),
    )
    return output


if __name__ == "__main__":
    main(run)
