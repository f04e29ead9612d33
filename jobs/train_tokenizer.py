"""Train a tokenizer for several datasets: `python jobs/train_tokenizer.py --source builtin --output data/tokenizer`.

No cluster is needed: it runs in this process.
"""

from __future__ import annotations

from _cli import add_config, add_fields, from_flags, list_fields, main, parse, split_commas
from _sources import located
from jsonargparse import ArgumentParser

from llama_ray.data.preparing.tokenizer_job import TrainTokenizerConfig, run_tokenizer_job
from llama_ray.data.tokenizing.training import TrainingOptions
from llama_ray.storage.paths import absolute, existing


def run() -> None:
    """Read the flags, train the tokenizer and write it."""
    run_tokenizer_job(_config(), log=lambda line: print(line, flush=True))


def _config() -> TrainTokenizerConfig:
    parser = ArgumentParser(
        prog="train_tokenizer.py",
        usage="train_tokenizer.py --source [NAME=]WHERE... --output DIR [--config FILE] [FLAG VALUE]...",
        description="Train a tokenizer on a mixture of sources.",
    )
    add_config(parser)
    add_fields(parser, TrainTokenizerConfig, skip={"training"})
    add_fields(parser, TrainingOptions)
    flags = parse(parser)
    split_commas(flags, ("weights", "special_tokens"))
    lists = {name: tuple(flags[name] or ()) for name in list_fields(TrainingOptions)}
    return from_flags(
        TrainTokenizerConfig,
        flags,
        source=[located(source) for source in flags.source or []],
        output=absolute(flags.output),
        compare=[existing(path) for path in flags.compare or ()],
        training=from_flags(TrainingOptions, flags, **lists),
    )


if __name__ == "__main__":
    main(run)
