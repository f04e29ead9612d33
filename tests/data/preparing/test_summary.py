from __future__ import annotations

from pathlib import Path

from llama_ray.data.cleaning.drops import Drop
from llama_ray.data.dataset.info import DatasetInfo, TokenizerInfo, read_info, write_info
from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.corpus import find_corpus
from llama_ray.data.preparing.part_record import PartRecord
from llama_ray.data.preparing.parts import divide
from llama_ray.data.preparing.summary import Summary


def test_a_dropped_text_of_a_file_whose_name_is_not_utf_8_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "\udcff.txt").write_text("x")
    config = PrepareConfig([str(folder)], str(tmp_path / "out"))
    corpus = find_corpus(config.sources(), config.fields())
    [part] = divide(corpus, 1)
    record = PartRecord(0.01)
    record.drops.add("texts", f"texts/{part.pieces[0].id}", Drop("rule", "text", 1, 1, "x"))
    summary = Summary(corpus)
    summary.add(part, record)
    splits: dict[str, tuple[()]] = {"train": (), "validation": ()}
    write_info(tmp_path, DatasetInfo("", 0, 2, TokenizerInfo("", 300), summary.sources(), splits))
    [source] = read_info(tmp_path).sources
    assert source.dropped["rule (texts)"].examples == ("texts/\\xff.txt:0",)
