"""A tokenizer of its own, trained on a mixture of sources, for several datasets to share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llama_ray.data.cleaning.config import CleanConfig
from llama_ray.data.preparing.bad_records import BAD_RECORDS_FILE
from llama_ray.data.preparing.config import NamedSource, named_sources, shares
from llama_ray.data.preparing.corpus import find_corpus
from llama_ray.data.preparing.output_directory import WORK
from llama_ray.data.preparing.progress import Log
from llama_ray.data.preparing.reading import Reading
from llama_ray.data.preparing.tokenizer_sample import BAD_SAMPLE_FILE, SAMPLE_BYTES, TokenizerSample
from llama_ray.data.preparing.tokenizers import train_tokenizer
from llama_ray.data.records.fields import TextFields
from llama_ray.data.tokenizing.comparison import compare_tokenizers, table
from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.files import TOKENIZER_FILE
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.data.tokenizing.training import TrainingOptions
from llama_ray.storage.atomic import write_text
from llama_ray.utils.errors import printable
from llama_ray.utils.fields import check_fields, limits
from llama_ray.utils.redact import RedactedRepr

_HELD_OUT = 20
"""Of so many texts, one is kept to compare tokenizers on."""
_HELD_OUT_BYTES = 2_000_000


@dataclass(frozen=True, repr=False)
class TrainTokenizerConfig(RedactedRepr):
    r"""What to train a tokenizer on, and where to write it.

    Args:
        source: 'builtin' (source code of the standard library), a file, a folder, a glob or a URI; NAME=WHERE names it.
        output: Directory for tokenizer.json and tokenizer_config.json.
        weights: NAME=SHARE of each source in the text to train on; by default that of its bytes.
        vocab_size: Maximum number of entries of the vocabulary.
        text_field: Field of a record that holds its text; dots lead into nested fields.
        template: Text with names of fields in braces, such as '{title}\n\n{body}', in place of one field.
        max_bad_records: Maximum number of broken records, which are left out; one more is an error.
        sample_characters: Maximum number of characters to train on; more takes long and changes few merges.
        seed: Decides which texts are taken where there are more.
        compare: Tokenizers whose bytes a token on texts that were held out are told beside those of the new one.
        overwrite: Replace a tokenizer in `output`.
        training: What the vocabulary is like.
    """

    source: list[str]
    output: str
    weights: list[str] | None = None
    vocab_size: int = field(default=32000, metadata=limits(1, Tokenizer.LARGEST_VOCABULARY))
    text_field: str = "text"
    template: str | None = None
    max_bad_records: int = field(default=0, metadata=limits(0, 2**63 - 1))
    sample_characters: int = field(default=SAMPLE_BYTES, metadata=limits(1, 2**63 - 1))
    seed: int = field(default=0, metadata=limits(0, 2**63 - 1))
    compare: list[str] | None = None
    overwrite: bool = False
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        check_fields(self)
        self.training.check(self.vocab_size)
        self.shares()
        self.fields()

    def sources(self) -> list[NamedSource]:
        """Return the sources with their names. Raises SourceError for a name that is given twice."""
        return named_sources(self.source)

    def shares(self) -> dict[str, float] | None:
        """Return source -> its share of the text, which sum to 1; None if its bytes decide."""
        return shares("weights", self.weights, self.sources())

    def fields(self) -> TextFields:
        """Return what makes the text of a record. Raises ValueError for a template that is none."""
        return TextFields(self.text_field, self.template)


def run_tokenizer_job(config: TrainTokenizerConfig, log: Log = print) -> Tokenizer:
    """Train the tokenizer that `config` describes, in this process, and write it.

    The result depends on the configuration and the text only. Raises a ValueError (SourceError, TokenizerError) for
    anything that the user can correct.
    """
    output = Path(config.output)
    if (output / TOKENIZER_FILE).exists() and not config.overwrite:
        raise TokenizerError(
            f"{printable(str(output))} holds a tokenizer; choose another output, or give --overwrite to replace it"
        )
    others = {printable(path, limit=48): Tokenizer.load(path) for path in config.compare or ()}
    corpus = find_corpus(config.sources(), config.fields(), seed=config.seed, output=output)
    _make_directory(output)
    for source in corpus.sources:
        log(f"{source.source.name}: {source.size / 1e6:,.1f} MB from {printable(source.source.where)}")
        for line in source.left_out.lines():
            log(line)
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, WORK).mkdir()
        sample = TokenizerSample(
            corpus,
            Reading(config.fields(), CleanConfig(), config.seed),
            Path(directory),
            output,
            limit=0,
            max_bad_records=config.max_bad_records,
            shares=config.shares(),
            size=config.sample_characters,
        )
        texts = _HeldOut(sample)
        tokenizer = train_tokenizer(texts, config.vocab_size, config.training, log)
        tokenizer.save(output)
        _keep_bad_records(Path(directory, WORK, BAD_SAMPLE_FILE), output, log)
    log(f"wrote {printable(str(output))}")
    for line in table(compare_tokenizers(texts.kept, {"this one": tokenizer} | others)) if texts.kept else ():
        log(line)
    return tokenizer


def _make_directory(output: Path) -> None:
    # Before training, which takes minutes.
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TokenizerError(
            f"cannot write to {printable(str(output))} ({error.strerror}); choose another output"
        ) from error


def _keep_bad_records(file: Path, output: Path, log: Log) -> None:
    if file.exists():
        content = file.read_text(encoding="utf-8")
        write_text(output / BAD_RECORDS_FILE, content)
        count = content.count("\n")
        log(f"left out {count:,} bad records, which {BAD_RECORDS_FILE} lists")


class _HeldOut:
    """Yields texts but for some, spread over all of them, which it keeps."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.kept: list[str] = []
        self._texts = texts

    def __iter__(self) -> Iterator[str]:
        kept = 0
        for number, text in enumerate(self._texts, 1):
            if number % _HELD_OUT == 0 and kept + len(text) <= _HELD_OUT_BYTES:
                self.kept.append(text)
                kept += len(text)
            else:
                yield text
