"""What people are shown of a dataset is what it holds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from llama_ray.data.dataset.files import LocalFiles
from llama_ray.data.dataset.info import TokenizerInfo
from llama_ray.data.dataset.token_dataset import TokenDataset
from llama_ray.data.inspection.batches import first_batches
from llama_ray.data.inspection.lengths import Lengths
from llama_ray.data.inspection.picture import write_picture
from llama_ray.data.inspection.summary import summary
from llama_ray.data.inspection.terminal import Style, bar, shown
from llama_ray.data.inspection.text import samples
from llama_ray.data.mixtures.loader import Loader
from llama_ray.data.mixtures.mixture import Mixture
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from tests.token_data import TEXTS, write_dataset, write_documents

PLAIN, COLOURED = Style(colours=False), Style(colours=True)
ESCAPE = re.compile(r"\033\[\d+m")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> LocalFiles:
    return LocalFiles(write_dataset(tmp_path_factory.mktemp("inspection") / "data"))


@pytest.fixture(scope="module")
def tokenizer(files: LocalFiles) -> Tokenizer:
    return Tokenizer.load(files.tokenizer_directory())


def test_lengths_are_those_of_the_documents(tmp_path: Path) -> None:
    lengths = [1, 3, 3, 8, 15, 40, 41]
    parts = [[range(length) for length in lengths[:3]], [range(length) for length in lengths[3:]]]
    found = Lengths.of(LocalFiles(write_documents(tmp_path, {"train": parts})), "train")
    assert (found.documents, found.tokens, found.longest) == (7, sum(lengths), 41)
    assert [found.quantile(share) for share in (0.1, 0.5, 1)] == [1, 8, 41]
    assert found.by_power() == [
        (1, 1, 1), (2, 3, 2), (4, 7, 0), (8, 15, 2), (16, 31, 0), (32, 63, 2),
    ]  # fmt: skip


def test_the_summary_fits_a_terminal_and_counts_right(files: LocalFiles, tokenizer: Tokenizer) -> None:
    lines = list(summary(files, tokenizer, PLAIN))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "\033" not in text
    assert re.search(rf"^train +50 +{files.info.tokens('train'):,} +100 % +1 ", text, re.MULTILINE)
    rows = [re.fullmatch(r" *[\d,]+-[\d,]+  [ ▏▎▍▌▋▊▉█]+ +([\d,]+)", line) for line in lines]
    assert sum(int(row[1]) for row in rows if row) == 50
    assert "bytes of text a token" in text
    assert f"of {files.info.vocab_size:,} entries" in text
    coloured = "\n".join(summary(files, tokenizer, COLOURED))
    assert ESCAPE.sub("", coloured) == text != coloured


def test_samples_are_whole_documents_with_their_borders(files: LocalFiles, tokenizer: Tokenizer) -> None:
    lines = list(samples(files, tokenizer, PLAIN, split="validation", number=99, seed=0, limit=10**6))
    assert lines[0].startswith("── validation: document 1 of 10, ")
    assert lines[1::2] == [f"<|begin_of_text|>{text}<|end_of_text|>" for text in TEXTS[50:]]
    cut = list(samples(files, tokenizer, PLAIN, split="train", number=1, seed=0, limit=5))
    assert re.fullmatch(r"\.\.\. and \d+ tokens", cut[2])


def test_what_the_loss_mask_leaves_out_is_marked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("print(x)", bos=True, eos=True)
    learned = [place not in (1, 2) for place in range(len(ids))]
    summary = TokenizerInfo("t", tokenizer.vocab_size)
    files = LocalFiles(write_documents(tmp_path, {"train": [[ids]]}, summary, {"train": [learned]}))
    left_out = tokenizer.decode(ids[1:3])
    for style, marked in ((PLAIN, f"⟦{left_out}⟧"), (COLOURED, f"\033[2m{left_out}\033[0m")):
        [_, text] = samples(files, tokenizer, style, split="train", number=1, seed=0, limit=99)
        assert text == f"<|begin_of_text|>{marked}{tokenizer.decode(ids[3:-1])}<|end_of_text|>"


def test_padding_after_the_last_example_of_a_row_is_not_shown(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("print(x)", bos=True, eos=True)
    padded = [*ids, *[tokenizer.eos_id or 0] * 7]
    learned = [place == len(ids) - 2 for place in range(len(padded))]
    directory = write_documents(
        tmp_path,
        {"train": [[padded]]},
        TokenizerInfo("t", tokenizer.vocab_size),
        {"train": [learned]},
        row_tokens=len(padded),
    )
    name, text = samples(LocalFiles(directory), tokenizer, PLAIN, split="train", number=1, seed=0, limit=99)
    assert f"document 1 of 1, {len(ids)} tokens" in name
    assert text == "⟦<|begin_of_text|>print(x⟧)⟦<|end_of_text|>⟧"


def test_a_text_gives_the_terminal_no_commands() -> None:
    assert shown("a\033[2Jb\r\x07\n\té日") == "a\\x1b[2Jb\\r\\x07\n\té日"


@pytest.mark.parametrize(
    ("share", "expected"), [(0, "    "), (0.001, "▏   "), (0.5, "██  "), (0.8, "███▎"), (1, "████")]
)
def test_bars_show_eighths_of_a_column_and_never_nothing(share: float, expected: str) -> None:
    assert bar(share, 4) == expected


def test_the_first_batches_are_those_of_the_run(files: LocalFiles, tokenizer: Tokenizer) -> None:
    def loader() -> Loader:
        mixture = Mixture.of(TokenDataset(files, "train"), documents=True)
        return Loader(mixture, seq_len=128, batch_size=3, rank=0, world_size=1, seed=5)

    lines = list(first_batches(loader(), tokenizer, PLAIN, steps=2, limit=10**6))
    titles = [line for line in lines if line.startswith("step")]
    assert titles == [
        "step 1: 3 sequences of 128 tokens, windows 0 to 2", "step 2: 3 sequences of 128 tokens, windows 3 to 5",
    ]  # fmt: skip
    run = loader()
    expected = []
    for batch in (batch for _ in range(2) for batch in run.next_global_batch()):
        assert batch.starts is not None
        for ids, starts in zip(batch.inputs, batch.starts, strict=True):
            for start in np.unique(starts):
                part = ids[starts == start].tolist()
                expected.append(tokenizer.decode(part, skip_special=False))
    found = [line for line in lines if not line.startswith(("step", "──"))]
    assert [line[14:].replace("\n" + " " * 14, "\n") for line in found] == expected


def test_a_picture_is_written(files: LocalFiles, tmp_path: Path) -> None:
    write_picture(files, tmp_path / "data.svg")
    svg = (tmp_path / "data.svg").read_text()
    assert "<!-- train: 50 documents, median " in svg
