"""Look at prepared data: `python jobs/inspect_data.py data/mine`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from _cli import add_config, main, parse
from _data import sources_of, stages_of
from jsonargparse import ArgumentParser, Namespace

from llama_ray.data.dataset.info import SPLITS
from llama_ray.data.dataset.locations import open_files
from llama_ray.data.dataset.verify import verify
from llama_ray.data.inspection.examples import LEGEND
from llama_ray.data.inspection.picture import check_suffix, write_picture
from llama_ray.data.inspection.summary import summary
from llama_ray.data.inspection.terminal import Style
from llama_ray.data.inspection.text import samples
from llama_ray.data.mixtures.sources import DataSource
from llama_ray.data.report.numbers import size
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.storage.paths import absolute
from llama_ray.training.config import TrainConfig
from llama_ray.utils.fields import shown
from llama_ray.utils.redact import redact

_OF_A_RUN = {"seq_len", "batch_size", "gradient_accumulation_steps", "seed", "stages"}


def run() -> None:
    """Read the flags and print what they ask for."""
    flags = parse(_parser())
    sources = sources_of(flags.data)
    locations = list(dict.fromkeys(source.location for source in sources))
    _check(flags)
    style = Style(colours=sys.stdout.isatty())
    if flags.verify:
        sys.exit(_verify(locations))
    if flags.output:
        _draw(locations, Path(absolute(flags.output)))
    lines = _batches(sources, flags, style) if flags.batches else _contents(locations, flags, style)
    for line in lines:
        print(line)


def _check(flags: Namespace) -> None:
    least = {"samples": 0, "sample_tokens": 1, "batches": 0, "world_size": 1}
    for name, limit in least.items():
        if flags[name] < limit:
            raise ValueError(f"{name} is {flags[name]}; it must be at least {limit}")
    if flags.split not in SPLITS:
        raise ValueError(f"split is {shown(flags.split)}; it must be {' or '.join(SPLITS)}")


def _verify(locations: list[str]) -> int:
    """Print a line for each file that is not as it was written, and return the exit code."""
    code = 0
    for location in locations:
        files = open_files(location)
        faults = 0
        for fault in verify(files):
            faults += 1
            print(redact(f"{location}: {fault}"), file=sys.stderr, flush=True)
        if faults:
            code = 2
        else:
            shards = [shard for shards in files.info.splits.values() for shard in shards]
            number, total = len(shards) + len(files.info.files), size(sum(shard.bytes for shard in shards))
            print(redact(f"{location}: all {number:,} files ({total} of shards) are as they were written"))
    return code


def _draw(locations: list[str], path: Path) -> None:
    check_suffix(path)
    if len(locations) > 1:
        raise ValueError(
            f"output is a picture of one directory; {len(locations)} are given; leave out the others"
        )
    write_picture(open_files(locations[0]), path)
    print(f"wrote {path}")


def _contents(locations: list[str], flags: Namespace, style: Style) -> Iterator[str]:
    for location in locations:
        files = open_files(location)
        for split in files.info.splits:
            files.check(split)
        tokenizer = Tokenizer.load(files.tokenizer_directory())
        yield from summary(files, tokenizer, style)
        yield ""
        if not style.colours and any(s.masked for shards in files.info.splits.values() for s in shards):
            yield LEGEND
        yield from samples(
            files, tokenizer, style,
            split=flags.split, number=flags.samples, seed=flags.seed, limit=flags.sample_tokens,
        )  # fmt: skip


def _batches(sources: Sequence[DataSource], flags: Namespace, style: Style) -> Iterator[str]:
    # Imported here, because torch takes seconds.
    from llama_ray.data.inspection.batches import first_batches
    from llama_ray.data.mixtures.loader import Loader
    from llama_ray.data.mixtures.opening import common_tokenizer, open_mixture, read_infos

    infos = read_infos(sources)
    config = TrainConfig(
        seq_len=flags.seq_len or infos[sources[0].name].row_tokens or flags.max_seq_len or 0,
        batch_size=flags.batch_size,
        gradient_accumulation_steps=flags.gradient_accumulation_steps,
        seed=flags.seed,
        stages=stages_of(flags.stages),
    )
    if not config.seq_len:
        raise ValueError("seq_len is 0; it must be that of the run; give --seq_len")
    tokenizer = common_tokenizer(sources, infos)
    loader = Loader(
        open_mixture(sources, "train", documents=True),
        seq_len=config.seq_len,
        # What all workers take together, in the order of the ranks.
        batch_size=config.batch_size * flags.world_size,
        rank=0,
        world_size=1,
        seed=config.seed,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        stages=config.stages,
    )
    return first_batches(loader, tokenizer, style, steps=flags.batches, limit=flags.sample_tokens)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="inspect_data.py",
        description="Show what is in prepared data, or what a run will see of it first.",
    )
    add_config(parser)
    parser.add_argument(
        "data", nargs="+", metavar="DIR",
        help="A directory that prepare_data.py wrote, its URI, or files of Megatron; or several as NAME=DIR:WEIGHT, "
        "as jobs/train.py takes them.",
    )  # fmt: skip
    parser.add_argument(
        "--verify", type=bool, default=False,
        help="Read all files, name those that are damaged, and end with code 2 if any is.",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=str | None, help="Also draw a picture: a file that ends with .svg, .png or .pdf."
    )
    parser.add_argument(
        "--split", type=str, default="train", help="Split that sample documents are taken from."
    )
    parser.add_argument(
        "--samples", type=int, default=3, help="Number of documents to show, chosen by `seed`."
    )
    parser.add_argument("--sample_tokens", type=int, default=200, help="Tokens to show of each document.")
    parser.add_argument(
        "--batches", type=int, default=0,
        help="Show the first N global batches of a run instead; give the flags of that run, too.",
    )  # fmt: skip
    parser.add_argument("--world_size", type=int, default=1, help="Number of workers of that run.")
    parser.add_argument(
        "--max_seq_len", type=int | None, help="Its sequence length, where it has no --seq_len."
    )
    others = {field.name for field in dataclasses.fields(TrainConfig)} - _OF_A_RUN
    parser.add_class_arguments(TrainConfig, skip=others)
    return parser


if __name__ == "__main__":
    main(run)
