"""Train a LLaMA on the cluster and register it: `python jobs/train.py --data data/mine --preset llama-110m`."""

from __future__ import annotations

import dataclasses
import sys
from argparse import SUPPRESS, Action
from typing import Any

from _cli import add_config, main, parse
from _data import SOURCES, sources_of, stages_of
from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from llama_ray.data.mixtures.opening import common_tokenizer, read_infos
from llama_ray.data.mixtures.sources import DataSource, parse_sources
from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.prepare import prepare
from llama_ray.data.sources.files import BUILTIN
from llama_ray.model.config import PRESETS, LlamaConfig, RopeScaling
from llama_ray.orchestration.cluster import connect
from llama_ray.orchestration.launch import LaunchConfig
from llama_ray.orchestration.trainer import train_on_ray
from llama_ray.storage.paths import absolute
from llama_ray.training.config import TrainConfig
from llama_ray.training.errors import TrainingError
from llama_ray.training.hosts.interrupt import Stopped
from llama_ray.training.preflight import check_run
from llama_ray.utils.redact import redact

DEFAULT_PRESET = "llama-30m"


def run() -> None:
    """Read the flags, connect to the cluster (RAY_ADDRESS, or a local one), train, and report the result."""
    flags = parse(_parser(), lists=["data"])
    config = TrainConfig(**_fields_of(TrainConfig, flags) | {"stages": stages_of(flags.stages)})
    launch = LaunchConfig(**_fields_of(LaunchConfig, flags))
    shape = _shape(flags)
    if flags.data:
        data = sources_of(flags.data)
        shape = _with_vocabulary(shape, flags, data)
        # What can be checked is checked now, because a cluster takes seconds to start. A run that resumes is checked
        # together with its checkpoint.
        if launch.resume is None:
            check_run(shape, config, data, launch.workers[1])
        connect()
    else:
        builtin = _builtin(shape.vocab_size)
        data = parse_sources(builtin.output)
        connect()
        prepare(builtin, log=lambda line: print(line, flush=True))
        shape = _with_vocabulary(shape, flags, data)
    try:
        outcome = train_on_ray(shape, config, launch, data)
    except Stopped as stopped:
        print(stopped, flush=True)
        return
    except TrainingError as error:
        sys.exit(f"error: {redact(str(error))}")
    if len(outcome.epochs) > 1:
        epochs = (f"{number:.2f} of {name}" for name, number in outcome.epochs.items())
        print(f"epochs: {', '.join(epochs)}", flush=True)
    print(
        f"validation loss {outcome.validation_loss:.4f}; last checkpoint {redact(outcome.checkpoint)}",
        flush=True,
    )
    if outcome.version and outcome.decision:
        print(f"registered {outcome.version.uri}; {outcome.decision.reason}", flush=True)


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
        "--preset",
        type=str | None,
        metavar="NAME",
        help=f"Shape of the model: {', '.join(PRESETS)}. Without a preset: the sizes of {DEFAULT_PRESET} and the "
        "vocabulary of the data.",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        type=str | None,
        metavar="NAME",
        help="Continue the run of this name in output_dir; without a name, the run that saved last.",
    )
    _add_shape(parser)
    parser.add_class_arguments(TrainConfig)
    parser.add_class_arguments(LaunchConfig, skip={"resume"})
    return parser


def _add_shape(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("The model's shape; each flag replaces one value of the preset")
    described = {
        param.arg_name: param.description for param in parse_docstring(LlamaConfig.__doc__ or "").params
    }
    for field in dataclasses.fields(LlamaConfig):
        kind = _SHAPE_TYPES.get(field.name, int)
        group.add_argument(f"--{field.name}", type=kind | None, help=described[field.name])


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


def _with_vocabulary(shape: LlamaConfig, flags: Namespace, data: tuple[DataSource, ...]) -> LlamaConfig:
    """Return `shape` with the vocabulary of the data, unless the user gives one."""
    infos = read_infos(data)
    common_tokenizer(data, infos)
    if flags.vocab_size is not None or flags.preset is not None:
        return shape
    return dataclasses.replace(shape, vocab_size=infos[data[0].name].vocab_size)


def _builtin(vocab_size: int) -> PrepareConfig:
    """Return how to prepare the built-in corpus with this vocabulary, which happens on first use."""
    output = absolute(f"data/builtin-{vocab_size}")
    return PrepareConfig(source=[BUILTIN], output=output, vocab_size=vocab_size)


if __name__ == "__main__":
    main(run)
