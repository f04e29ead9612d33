"""The tokenizers of a preparation: given ones, or one that is trained and kept in the staging directory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from llama_ray.data.conversations.examples import ExampleEncoder
from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.output_directory import WORK
from llama_ray.data.preparing.part_task import COMPARED
from llama_ray.data.preparing.progress import Log
from llama_ray.data.tokenizing.encoder import EncoderChoice, choose_encoder
from llama_ray.data.tokenizing.files import TOKENIZER_FILE
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.data.tokenizing.training import TrainingOptions
from llama_ray.storage.atomic import write_text
from llama_ray.utils.typed_json import from_json


@dataclass(frozen=True)
class GivenTokenizers:
    """The tokenizers that the user gives: the dataset's, and one to compare it to."""

    tokenizer: Tokenizer | None
    compared: Tokenizer | None

    @classmethod
    def load(cls, config: PrepareConfig) -> GivenTokenizers:
        """Read those that `config` names. Raises TokenizerError for one that cannot be used for documents.

        That of conversations is the model's own, with its chat template or the given one.
        """
        if config.row_tokens is not None:
            of_model = config.conversations.apply(Tokenizer.load(config.tokenizer or ""))
            # Says what is wrong with its template.
            ExampleEncoder(of_model, config.conversations.now)
            return cls(of_model, None)
        tokenizer, compared = (
            None if path is None else Tokenizer.load(path).for_documents()
            for path in (config.tokenizer, config.compare_tokenizer)
        )
        return cls(tokenizer, compared)

    def identities(self) -> tuple[object, object]:
        """Return what the dataset depends on."""
        return _identity(self.tokenizer), _identity(self.compared)


def _identity(tokenizer: Tokenizer | None) -> object:
    if tokenizer is None:
        return None
    template = tokenizer.chat_template
    return tokenizer.fingerprint, tokenizer.bos_id, tokenizer.eos_id, template and template.templates


def make_tokenizer(
    config: PrepareConfig, given: GivenTokenizers, sample: Iterable[str], staging: Path, log: Log
) -> tuple[Tokenizer, EncoderChoice]:
    """Return the dataset's tokenizer and what encodes with it; `staging` then holds all tokenizers.

    Those that a killed preparation left there are taken.
    """
    chosen = staging / WORK / "encoder.json"
    if chosen.exists():
        choice = from_json(EncoderChoice, json.loads(chosen.read_bytes()))
        # Another version of the library was not checked.
        if choice.is_installed:
            return Tokenizer.load(staging), choice
    if (staging / TOKENIZER_FILE).exists():
        tokenizer = Tokenizer.load(staging)
    else:
        tokenizer = given.tokenizer or train_tokenizer(sample, config.vocab_size, config.training, log)
        tokenizer.save(staging)
    if given.compared is not None:
        given.compared.save(staging / COMPARED)
    if config.row_tokens is None:
        choice = choose_encoder(tokenizer, sample)
    else:
        choice = EncoderChoice(False, "tokenizers", "it tells special tokens of the chat template from text")
    log(f"encoding with {choice.name}: {choice.reason}")
    write_text(chosen, json.dumps(asdict(choice)))
    return tokenizer, choice


def train_tokenizer(texts: Iterable[str], vocab_size: int, options: TrainingOptions, log: Log) -> Tokenizer:
    """Train a tokenizer and log how long that took and what it gave; see `Tokenizer.train`."""
    size = 0

    def counted() -> Iterator[str]:
        nonlocal size
        for text in texts:
            size += len(text)
            yield text

    log(f"training a tokenizer of {vocab_size:,} entries")
    started = time.monotonic()
    tokenizer = Tokenizer.train(counted(), vocab_size, options)
    fewer = "" if tokenizer.vocab_size == vocab_size else "; the text gives no more"
    log(
        f"tokenizer: {tokenizer.vocab_size:,} entries from {size / 1e6:,.1f} MB in "
        f"{time.monotonic() - started:.1f} s{fewer}"
    )
    return tokenizer
