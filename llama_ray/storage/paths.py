"""What a relative path of the user means, also inside a Ray job."""

from __future__ import annotations

import sys
from pathlib import Path

MODEL_SCHEME = "models:/"
_JOB_COPY = ("runtime_resources", "working_dir_files")


def workspace() -> Path:
    """The directory that relative output paths refer to: the current one, or ``~/llama_ray`` inside a Ray job.

    ``ray job submit --working-dir`` runs a script in a temporary copy of the working directory, which Ray
    deletes some time after the job: what is written there is lost.
    """
    here = Path.cwd()
    pairs = zip(here.parts, here.parts[1:], strict=False)
    return Path.home() / "llama_ray" if _JOB_COPY in pairs else here


def absolute(path: str) -> str:
    """``path`` as seen from the workspace, without ``~`` and ``..``; a URI (``s3://...``) stays as it is.

    Says so on stderr where a relative path leads elsewhere than to the current directory.
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
    """Like :func:`absolute`, for something to read: what exists in the current directory comes first."""
    if is_uri(path):
        return path
    here = Path(path).expanduser().resolve()
    return str(here) if here.exists() else absolute(path)


def is_model_ref(ref: str) -> bool:
    """Whether `ref` names a version in the model registry: `models:/name/version` or `models:/name@alias`."""
    return ref.startswith(MODEL_SCHEME)


def existing_ref(ref: str) -> str:
    """`ref` itself where it names a version in the model registry, else the directory as `existing` finds it."""
    return ref if is_model_ref(ref) else existing(ref)


def is_uri(path: str) -> bool:
    """Whether ``path`` names a place by scheme, as in ``s3://bucket/corpus``."""
    scheme, separator, _ = path.partition("://")
    return bool(separator) and scheme.isalnum()
