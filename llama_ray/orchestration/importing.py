"""Make a model that exists elsewhere a version of the registry, which the endpoint then serves as any other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.exporting.hugging_face import write_directory
from llama_ray.model.config import LlamaConfig
from llama_ray.model.weight_files import INDEX, SINGLE, CheckpointError
from llama_ray.orchestration.peer_check import PeerCheck, check_against_transformers
from llama_ray.orchestration.registering import register_directory
from llama_ray.orchestration.report import describe_import
from llama_ray.pretrained import fixed, load_tokenizer, open_pretrained, resolve
from llama_ray.tracking.registry import PromotionDecision, Version, check_name, decide_alias
from llama_ray.tracking.tags import parent_tags
from llama_ray.utils.errors import printable

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What to import, and as what.

    Args:
        register_as: Name to register the model under.
        dtype: Number format of the version's weights; by default that of the weights that are imported.
        promote: Whether the version becomes the champion, which endpoints serve.
        verify: Whether logits are compared with those of transformers, where that is installed.
        experiment: MLflow experiment that the import belongs to.
    """

    register_as: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    promote: bool = False
    verify: bool = True
    experiment: str = "llama-ray"

    def __post_init__(self) -> None:
        check_name(self.register_as)


def import_checkpoint(ref: str, config: ImportConfig, log: Log) -> tuple[Version, PromotionDecision | None]:
    """Register the model of `ref` (see `resolve`) with its tokenizer and chat template; `log` receives lines.

    A tensor at a time is in memory, but for the comparison with transformers. A version that has these weights already
    is returned, and nothing is registered a second time. Raises ValueError with one line for a model that cannot be
    read, has no tokenizer, or is not what transformers makes of it; TrackingError for what MLflow refuses.
    """
    source = fixed(ref)
    path = resolve(source)
    with ExitStack() as stack:
        stored = open_pretrained(path, stack)
        tokenizer = load_tokenizer(path, stored.config.vocab_size)
        if tokenizer is None:
            raise CheckpointError(
                f"{printable(ref)} holds no tokenizer, which a served model needs; add its tokenizer.json"
            )
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()), "model")
        dtype = stored.dtype if config.dtype is None else getattr(torch, config.dtype)
        count, formats = stored.config.num_parameters(), dict.fromkeys(map(_name, (stored.dtype, dtype)))
        log(f"{printable(source)}: {count:,} parameters in {' to '.join(formats)}")
        write_directory(stored, tokenizer, path, directory, dtype=dtype)
        check = PeerCheck(None, "not compared with transformers, as asked")
        if config.verify:
            check = check_against_transformers(directory, tokenizer, path if _is_hugging_face(path) else None)
        log(check.text)
        version = _register(source, config, directory, stored.config, tokenizer, check)
    return version, _promote(version) if config.promote else None


def _is_hugging_face(path: Path) -> bool:
    """Whether transformers reads `path` as it is."""
    return any((path / name).is_file() for name in (SINGLE, INDEX))


def _register(
    source: str,
    config: ImportConfig,
    directory: Path,
    shape: LlamaConfig,
    tokenizer: Tokenizer,
    check: PeerCheck,
) -> Version:
    return register_directory(
        directory,
        name=config.register_as,
        run_name=f"import-{config.register_as}",
        experiment=config.experiment,
        params={"source": source, "model": shape.to_dict()},
        tags=parent_tags(source),
        description=describe_import(
            shape, source, check.text, has_template=tokenizer.chat_template is not None
        ),
    )


def _promote(version: Version) -> PromotionDecision:
    def decide(new: Version, old: Version | None) -> PromotionDecision:
        if old is not None and old.version == new.version:
            return PromotionDecision(False, f"version {new.version} is champion already")
        instead = "" if old is None else f" in place of version {old.version}"
        return PromotionDecision(True, f"version {new.version} is the champion{instead}, as asked")

    return decide_alias(version.name, version.version, decide)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
