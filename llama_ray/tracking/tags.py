"""The tags of every run: who started it, from which commit, on which hardware."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from llama_ray.utils.redact import redact

_SOURCE = Path(__file__).resolve().parents[2]


def standard_tags(*, world_size: int, device: str) -> dict[str, str]:
    """Return the tags that MLflow's UI has columns and links for (user, source, commit), and the run's resources."""
    tags = {
        "mlflow.source.name": Path(sys.argv[0] or sys.executable).name,
        "mlflow.source.type": "LOCAL",
        "world_size": str(world_size),
        "device": device,
        "host": socket.gethostname(),
        "torch": importlib.metadata.version("torch"),
    }
    # The user id of a container may have no name.
    with contextlib.suppress(KeyError, OSError):
        tags["mlflow.user"] = getpass.getuser()
    return tags | git_tags(_SOURCE, _editable_install())


def parent_tags(parent: str | None) -> dict[str, str]:
    """Return the tag of a run, and of a version, that began with the weights of `parent`; {} for random ones."""
    return {} if parent is None else {"parent": redact(parent)}


def git_tags(source: Path, installed: Path | None = None) -> dict[str, str]:
    """Return the commit of the code in `source`, and whether the code differs from it; {} if unknown.

    A Ray job runs from a copy of the tree without `.git`. The commit is then that of `installed`, the repository of an
    editable install, and git compares the copy with it.
    """
    repository = source if (source / ".git").exists() else installed
    if repository is None or not (repository / ".git").exists():
        return {}
    git = ["git", "--git-dir", str(repository / ".git"), "--work-tree", str(source)]
    commit = _run([*git, "rev-parse", "HEAD"])
    if commit is None or commit.returncode != 0:
        return {}
    tags = {"mlflow.source.git.commit": commit.stdout.strip()}
    changed = _run([*git, "diff", "--quiet", "HEAD", "--", "llama_ray"])
    if changed is not None and changed.returncode == 1:
        tags["mlflow.source.git.dirty"] = "true"
    return tags


def _editable_install() -> Path | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        text = importlib.metadata.distribution("llama-ray").read_text("direct_url.json")
        url = urlsplit(json.loads(text)["url"]) if text else None
        if url is not None and url.scheme == "file":
            return Path(url2pathname(url.path))
    return None


def _run(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    # Without optional locks git does not write the repository's index when it compares another tree.
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=10,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
            cwd=command[4],
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
