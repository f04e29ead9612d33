import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from llama_ray.data.cleaning.drops import Drop, Drops
from llama_ray.data.dataset.info import Counted, DatasetInfo, SourceInfo, TokenizerInfo
from llama_ray.data.dataset.shards import Shard
from llama_ray.data.report.page import page, write_report
from llama_ray.data.report.statistics import Document, Statistics

HOSTILE = "</pre><script>alert('x')</script>\x1b[31m&\ud800\""
VOID = {"meta"}


class Reader(HTMLParser):
    """Collects the text and the elements of a page, and checks that each is closed in its turn."""

    def __init__(self, content):
        super().__init__()
        self.texts, self.elements, self._open = [], [], []
        self.feed(content)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)


@pytest.fixture
def info():
    return DatasetInfo(
        fingerprint="f00d",
        seed=0,
        token_bytes=2,
        tokenizer=TokenizerInfo("beef", 32000, 0, 1, origin="trained on 98 MB", encoder="gigatoken"),
        sources=(
            SourceInfo(
                "web",
                "/raw/web",
                files=12,
                texts=1000,
                text_bytes=4000,
                bad_records={"not JSON": Counted(7, ("a.jsonl:3",))},
            ),
            SourceInfo(
                "code",
                f"/raw/{HOSTILE}",
                files=1,
                texts=4,
                left_out={"hidden": Counted(2, (".git", HOSTILE))},
            ),
        ),
        splits={
            "train": (Shard("train-00000.bin", "web", 1234567, 890, 0, False, 2469134, "cafe"),),
            "validation": (Shard("validation-00000.bin", "web", 1000, 10, 0, False, 2000, "cafe"),),
        },
        settings={"dedup": "minhash", "template": HOSTILE, "tokenizer": None},
    )


@pytest.fixture
def statistics():
    found = Statistics()
    found.add("web", (Document(f"web/{number}", "four" * number, number + 2, "en") for number in range(1, 9)))
    found.add("code", [Document(HOSTILE, HOSTILE, 100, "")])
    return found


@pytest.fixture
def drops():
    found = Drops()
    found.add("web", "web/a:17", Drop("c4/javascript", "line", 3, 60, "Turn on javascript."))
    found.add("web", HOSTILE, Drop("gopher_quality/short_doc", "text", 1, 900, HOSTILE, HOSTILE))
    return found


def test_the_page_tells_all_of_it(info, statistics, drops):
    text = Reader(page(info, statistics, drops)).text

    for expected in [
        "1.23 Mtraining tokens",
        "900documents",
        "4.00 kBof text",
        "web4.00 bytes a token",
        "web: 8 documents, 6.5 tokens in the mean one",
        "in a sample of 8 of the 9 documents",
        "1 of 1,004 texts were dropped (< 0.1 %), and 3 lines of other texts",
        "gopher_quality/short_doc in web1 text · 900",
        "c4/javascript in web3 lines · 60",
        "web/a:17Turn on javascript.",
        "bad recordnot JSON7a.jsonl:3",
        "left outhidden2.git",
        "trained on 98 MB",
        "dedupminhash",
    ]:
        assert expected in text
    assert "tokenizerNone" not in text


def test_what_a_text_holds_is_no_html(tmp_path, info, statistics, drops):
    path = write_report(tmp_path, info, statistics, drops)
    reader = Reader(path.read_text(encoding="utf-8"))

    assert "script" not in {tag for tag, _ in reader.elements}
    assert reader.text.count("<script>alert('x')</script>") >= 7
    assert "\x1b" not in reader.text


def test_the_page_needs_no_other_file(info, statistics, drops):
    content = page(info, statistics, drops)
    attributes = {name for _, given in Reader(content).elements for name in given}

    assert not attributes & {"src", "href", "srcset", "onclick"}
    assert not re.search(r"url\(|@import|https?://", content)


def test_columns_are_as_high_as_their_shares(info, statistics, drops):
    content = page(info, statistics, drops)
    titles = re.findall(r"<title>([^<]*tokens: [^<]*)</title>", content)
    # Of web: 3 tokens; 4 to 7; 8 to 10.
    assert "2 to 3 tokens: 1 documents, 12 %" in titles
    assert "4 to 7 tokens: 4 documents, 50 %" in titles
    assert "8 to 15 tokens: 27 tokens, 52 %" in titles
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([^"]*)" class="first"', content)]
    assert heights[2] == pytest.approx(4 * heights[1], abs=0.02)


def test_what_there_is_nothing_of_is_left_out(info):
    text = Reader(page(info, Statistics(), Drops())).text

    assert "Cleaning" not in text
    assert "Languages" not in text
    assert "Lengths" not in text


def test_conversations_are_shown_with_what_is_learned_of_them(info):
    shards = {
        split: (Shard(f"{split}-00000.bin", "web", tokens, 3, trained, True, 1, "aa"),)
        for split, tokens, trained in (("train", 256, 60), ("validation", 128, 20))
    }
    rows = replace(info, splits=shards, task="sft", row_tokens=128, end_of_turn_ids=(2, 7))
    statistics = Statistics()
    statistics.add("web", [Document("web/a:0", "user: hi", 200), Document("web/a:1", "user: ho", 120)])
    text = Reader(page(rows, statistics, Drops())).text
    for shown in (
        "2conversations", "25 %of their tokens are learned", "3rows of 128 tokens", "83 %of the rows are filled",
        "ends an answer2, 7", "user: ho",
    ):  # fmt: skip
        assert shown in text
    assert "bytes a token" not in text
