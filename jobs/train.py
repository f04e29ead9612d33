"""Train a LLaMA on the cluster and register it: `python jobs/train.py --data data/mine --preset llama-110m`."""

from __future__ import annotations

import dataclasses
import sys
from argparse import SUPPRESS, Action
from typing import Any

from _cli import add_config, add_fields, list_fields, main, parse, split_commas
from _data import SOURCES, sources_of, stages_of
from _shape import add_shape, shape_of, with_vocabulary
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from llama_ray.batch_inference.references import ensure_references
from llama_ray.data.mixtures.sources import parse_sources
from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.prepare import prepare
from llama_ray.data.sources.files import BUILTIN
from llama_ray.model.config import LlamaConfig
from llama_ray.orchestration.cluster import connect
from llama_ray.orchestration.launch import LaunchConfig
from llama_ray.orchestration.trainer import train_on_ray
from llama_ray.orchestration.training_job import checkpoint_to_resume
from llama_ray.pretrained import fixed, load_tokenizer, resolve
from llama_ray.storage import run_directory
from llama_ray.storage.attempts import Superseded
from llama_ray.storage.paths import absolute, existing_ref
from llama_ray.training.checkpointing.files import local_description
from llama_ray.training.config import TrainConfig
from llama_ray.training.errors import TrainingError
from llama_ray.training.hosts.interrupt import Stopped
from llama_ray.training.preflight import check_run
from llama_ray.training.starting_point import starting_point
from llama_ray.utils.redact import redact


def run() -> None:
    """Read the flags, connect to the cluster (RAY_ADDRESS, or a local one), train, and report the result."""
    flags = parse(_parser(), lists=["data"])
    split_commas(flags, ["lora_targets", "evaluate_tasks"])
    for name in ("init_from", "branch_from"):
        flags[name] = flags[name] and existing_ref(flags[name])
    launch = LaunchConfig(**_fields_of(LaunchConfig, flags))
    launch = dataclasses.replace(launch, output_dir=absolute(launch.output_dir))
    checkpoint = checkpoint_to_resume(launch)
    tunes = flags.task != "pretrain" or flags.lora_rank
    if tunes and checkpoint is not None and flags.init_from is None and flags.branch_from is None:
        # The run knows what it began with.
        flags.init_from = (run_directory.read_marker(checkpoint) or {}).get("parent")
    config = TrainConfig(**_fields_of(TrainConfig, flags) | {"stages": stages_of(flags.stages)})
    if config.init_from is not None and checkpoint is None:
        config = dataclasses.replace(config, init_from=fixed(config.init_from))
    # What can be checked is checked now, because a cluster takes seconds to start.
    with starting_point(config, checkpoint, local_description) as start:
        shape = shape_of(flags, config, start)
        if flags.data:
            data = sources_of(flags.data)
            shape = with_vocabulary(shape, flags, data, started=start is not None)
            check_run(shape, config, data, launch.workers[1], start)
    if flags.data:
        connect()
    elif config.task != "pretrain":
        raise ValueError(
            f"data is missing; task {config.task} needs data that prepare_data.py made with --task {config.task}; give "
            "--data DIR"
        )
    else:
        builtin = _builtin(shape, config.init_from)
        data = parse_sources(builtin.output)
        connect()
        prepare(builtin, log=_say)
        shape = with_vocabulary(shape, flags, data, started=start is not None)
    # A run that goes on has the reference that it began with.
    if config.task == "dpo" and config.init_from is not None and checkpoint is None:
        ensure_references([source.location for source in data], config.init_from, _say)
    try:
        outcome = train_on_ray(shape, config, launch, data)
    except Stopped as stopped:
        print(stopped, flush=True)
        return
    except (TrainingError, Superseded) as error:
        sys.exit(f"error: {redact(str(error))}")
    if len(outcome.epochs) > 1:
        epochs = (f"{number:.2f} of {name}" for name, number in outcome.epochs.items())
        print(f"epochs: {', '.join(epochs)}", flush=True)
    print(
        f"validation loss {outcome.validation_loss:.4f}; last checkpoint {redact(outcome.checkpoint)}",
        flush=True,
    )
    if outcome.version:
        why = f"; {outcome.decision.reason}" if outcome.decision else ""
        print(f"registered {outcome.version.uri}{why}", flush=True)


def _say(line: str) -> None:
    print(redact(line), flush=True)


class HelpFormatter(DefaultHelpFormatter):
    """Shows the type in place of a value's name, and a default only if there is one."""

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        return (self._get_type_str(action) or "value").partition(" | ")[0].upper()

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        return text if action.default in (None, SUPPRESS) else f"{text} (default: %(default)s)"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="train.py",
        usage="train.py [--preset NAME] [--data DIR | NAME=DIR:WEIGHT ...] [--config FILE] [FLAG VALUE]...",
        description="Train a LLaMA on a Ray cluster, track the run in MLflow and register the model.",
        formatter_class=HelpFormatter,
    )
    add_config(parser)
    parser.add_argument(
        "--data",
        type=SOURCES,
        metavar="DIR",
        help="Directory that prepare_data.py wrote, or a URI such as s3://BUCKET/DIR that it was copied to. For a "
        "mixture several, each as NAME=DIR:WEIGHT, or NAME=DIR to weight them by size; NAME=DIR#LABEL takes the "
        "shards of one source of the preparation. By default one is made from the built-in corpus.",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        type=str | None,
        metavar="NAME",
        help="Continue the run of this name in output_dir; without a name, the run that saved last. if_there, with "
        "--run_name: continue that run if output_dir has it, else start it.",
    )
    add_shape(parser)
    add_fields(parser, TrainConfig)
    add_fields(parser, LaunchConfig, skip={"resume"})
    return parser


def _fields_of(kind: type, flags: Namespace) -> dict[str, Any]:
    lists = {name: tuple(flags[name] or ()) for name in list_fields(kind)}
    return {field.name: flags[field.name] for field in dataclasses.fields(kind)} | lists


def _builtin(shape: LlamaConfig, init_from: str | None) -> PrepareConfig:
    """Return how to prepare the built-in corpus, which happens on first use: for a vocabulary of this size, or with the
    tokenizer of the weights that the run begins with.
    """
    if init_from is None:
        output = absolute(f"data/builtin-{shape.vocab_size}")
        return PrepareConfig(source=[BUILTIN], output=output, vocab_size=shape.vocab_size)
    tokenizer = load_tokenizer(init_from)
    if tokenizer is None:
        raise ValueError(
            f"{init_from} holds no tokenizer to prepare text with; give prepared data with --data DIR"
        )
    output = absolute(f"data/builtin-{tokenizer.fingerprint[:12]}")
    return PrepareConfig(source=[BUILTIN], output=output, tokenizer=str(resolve(init_from, weights=False)))


if __name__ == "__main__":
    main(run)
