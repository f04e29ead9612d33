"""The meaning of a path that the user gives, also inside a Ray job."""

from __future__ import annotations

import re
import sys
from pathlib import Path

MODEL_CACHE = Path("~/.cache/llama_ray/models")
"""What was downloaded from model registries to this machine."""
DATA_CACHE = Path("~/.cache/llama_ray/data")
"""Copies of the datasets in object stores that were read on this machine."""
_MODEL_SCHEME = "models:/"
_JOB_COPY = ("runtime_resources", "working_dir_files")


def workspace() -> Path:
    """Return the directory for relative output paths: the current one, but `~/llama_ray` inside a Ray job.

    `ray job submit --working-dir` runs a script in a temporary copy of the working directory. Ray deletes the copy
    some time after the job, with everything written there.
    """
    here = Path.cwd()
    pairs = zip(here.parts, here.parts[1:], strict=False)
    return Path.home() / "llama_ray" if _JOB_COPY in pairs else here


def absolute(path: str) -> str:
    """Return `path` relative to the workspace as an absolute path without `~` and `..`; a URI is returned unchanged.

    Reports on stderr where the path leads if the workspace is not the current directory.
    """
    if is_uri(path):
        return path
    given = Path(path).expanduser()
    base = workspace()
    resolved = (base / given).resolve()
    if not given.is_absolute() and base != Path.cwd():
        print(
            f"{path} is kept at {resolved} (the job's own directory is temporary)",
            file=sys.stderr,
            flush=True,
        )
    return str(resolved)


def existing(path: str) -> str:
    """Return the absolute path of something to read: in the current directory if it exists there, else `absolute`."""
    if is_uri(path):
        return path
    here = Path(path).expanduser().resolve()
    return str(here) if here.exists() else absolute(path)


def is_model_ref(ref: str) -> bool:
    """Whether `ref` names a version in the model registry: `models:/name/version` or `models:/name@alias`."""
    return ref.startswith(_MODEL_SCHEME)


def existing_ref(ref: str) -> str:
    """Return a reference to the model registry unchanged, and any other `ref` as `existing` does."""
    return ref if is_model_ref(ref) else existing(ref)


def model_name(ref: str) -> str:
    """Return the name of the model that a path or URI leads to: its last part, without the rest of a URI."""
    # A user or a password before the host is no part of the path.
    path = re.split("[@?]", re.sub("(?<=://)[^/]*@", "", ref), maxsplit=1)[0] if is_uri(ref) else ref
    return Path(path).name.removesuffix(".gguf")


def is_uri(path: str) -> bool:
    """Whether `path` begins with a scheme, as in `s3://bucket/corpus`."""
    scheme, separator, _ = path.partition("://")
    return bool(separator) and scheme.isalnum()
