"""Turn text into a tokenised dataset: `python jobs/prepare_data.py --source builtin --output data/builtin`."""

from __future__ import annotations

import dataclasses
import logging

from _cli import main, parse
from jsonargparse import ArgumentParser

from llama_ray.data.preparing.prepare import PrepareConfig, prepare
from llama_ray.data.sources.files import BUILTIN
from llama_ray.orchestration.cluster import connect
from llama_ray.storage.paths import absolute, existing


def run() -> None:
    """Read the flags, connect to the cluster (RAY_ADDRESS, or a local one) and prepare the data."""
    config = _config()
    connect(log_to_driver=False)
    # `prepare` reports the progress itself.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    prepare(config, log=lambda line: print(line, flush=True))


def _config() -> PrepareConfig:
    parser = ArgumentParser(prog="prepare_data.py", description="Turn text into a tokenised dataset.")
    parser.add_class_arguments(PrepareConfig, skip={"vocab_size", "tokenizer"})
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--vocab_size", type=int, default=32000, help="Maximum vocabulary size of the tokenizer to train."
    )
    either.add_argument(
        "--tokenizer",
        type=str,
        help="A tokenizer.json, or a directory that holds one, to use instead of training a tokenizer.",
    )
    config = PrepareConfig(**vars(parse(parser)))
    return dataclasses.replace(
        config,
        source=config.source if config.source == BUILTIN else existing(config.source),
        output=absolute(config.output),
        tokenizer=config.tokenizer and existing(config.tokenizer),
    )


if __name__ == "__main__":
    main(run)
