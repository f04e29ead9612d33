"""The output directory of training runs: which runs and which complete checkpoints it holds.

A checkpoint is a directory that `checkpoint_name` names. The file that is written last, the marker, names all other
files with their lengths and SHA-256. A directory without a marker is not a checkpoint; a checkpoint with a file that
does not match the marker is damaged. Both are skipped. Whatever else lies there is the user's: a copy or a link under
another name is never continued from, and nothing that was not written here is deleted.
"""

from __future__ import annotations

import json
import re
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_ray.storage import store
from llama_ray.utils.errors import first_line
from llama_ray.utils.redact import redact

MARKER = "training.json"
_SET_ASIDE = f"{MARKER}.damaged"

_OWN_FILE = re.compile(
    # What a checkpoint is written as, and the temporary names under which a killed run may have left it.
    r"(?P<name>(?:model|adapter|optimizer)-rank[0-9]{5,}\.safetensors|model\.safetensors\.index\.json"
    r"|(?:config|generation_config|tokenizer|tokenizer_config|adapter_config|adapter_base|training)\.json|training\.json\.damaged)"
    r"|\.(?P<partial>[\w.-]+)\.[0-9a-f]{8}"
)


def checkpoint_name(step: int, attempt: int | None = None) -> str:
    """Return the directory name of a step's checkpoint: `step_00000100`, or `step_00000100-2` apart for attempt 2."""
    return f"step_{step:08d}" if attempt is None else f"step_{step:08d}-{attempt}"


def checkpoint_step(name: str) -> int | None:
    """Return the step whose `checkpoint_name` is `name`; None for any other name."""
    parsed = _parse(name)
    return None if parsed is None else parsed[0]


def check_writable(output_dir: str) -> None:
    """Create `output_dir`, and write and delete a small file in it. Raises StorageError if that fails."""
    try:
        filesystem, path = store.open_storage(store.with_short_retries(output_dir))
        filesystem.create_dir(path, recursive=True)
        probe = f"{path}/.write-test-{uuid.uuid4().hex}"
        with filesystem.open_output_stream(probe) as stream:
            stream.write(b"x")
        filesystem.delete_file(probe)
    except (OSError, ValueError) as error:
        raise store.StorageError(
            f"output_dir {output_dir} cannot be written ({first_line(error)}); give another --output_dir"
        ) from error


def latest_run(output_dir: str) -> str:
    """Return the name of the run in `output_dir` that saved a checkpoint last. Raises StorageError if there is none.

    A copy of a run is not considered beside the run itself, however new its files are.
    """
    newest = {
        name: last
        for name in store.list_directories(output_dir)
        if (last := latest_checkpoint(store.join(output_dir, name)))
    }
    identities = {name: _identity(checkpoint) for name, checkpoint in newest.items()}
    runs = [n for n, (run, id) in identities.items() if run == n or identities.get(run) != (run, id)]
    if not runs:
        raise store.StorageError(
            f"output_dir {output_dir} holds no run to resume; check --output_dir, or leave out --resume"
        )
    return max(runs, key=lambda name: store.modified_ns(store.join(newest[name], MARKER)))


def latest_checkpoint(run: str) -> str | None:
    """Return the newest checkpoint in the run directory `run` whose files have their full lengths; None without one."""
    return next((c for c in list_checkpoints(run) if not missing_or_truncated(c)), None)


def list_checkpoints(run: str) -> list[str]:
    """Return the directories in `run` that have a marker, without further checks: newest step, newest attempt first.

    One whose marker tells of another step, or another attempt than its name, is a copy that the user made, and not
    listed.
    """
    named = {parsed: name for name in store.list_directories(run) if (parsed := _parse(name))}
    return [
        checkpoint
        for parsed in sorted(named, key=lambda parsed: (parsed[0], parsed[1] or 0), reverse=True)
        if _has_marker(checkpoint := store.join(run, named[parsed])) and _is_original(checkpoint, *parsed)
    ]


def checkpoint_of(run: str, step: int) -> str:
    """Return the complete checkpoint of `step` in `run`, that of the newest attempt; where it would be, without one."""
    found = [c for c in list_checkpoints(run) if checkpoint_step(store.name_of(c)) == step]
    return found[0] if found else store.join(run, checkpoint_name(step))


def checkpoints_of(run: str, step: int) -> list[str]:
    """Return the directories in `run` that are named as checkpoints of `step`, by any attempt, complete or not."""
    return [store.join(run, name) for name in store.list_directories(run) if checkpoint_step(name) == step]


def read_marker(checkpoint: str) -> dict[str, Any] | None:
    """Return the marker of `checkpoint`; None if it is missing or not what a checkpoint's marker must be."""
    try:
        content = json.loads(store.read_text(store.join(checkpoint, MARKER)) or "")
    except ValueError:
        return None
    return content if isinstance(content, dict) and isinstance(content.get("files"), dict) else None


def missing_or_truncated(checkpoint: str) -> str | None:
    """Compare the names and lengths of files to the marker; return, and warn of, the first difference, or None."""
    marker = read_marker(checkpoint)
    if marker is None:
        return _damaged(checkpoint, f"{MARKER} cannot be read")
    filesystem, path = store.open_storage(checkpoint)
    for file, record in marker["files"].items():
        size = filesystem.get_file_info(f"{path}/{file}").size
        if size != record["bytes"]:
            return _damaged(checkpoint, f"{file} has {size or 0} bytes, {record['bytes']} were written")
    return None


def changed_content(checkpoint: str, files: Iterable[str]) -> str | None:
    """Compare the SHA-256 of `files` to the marker; return, and warn of, the first difference, or None."""
    marker = read_marker(checkpoint) or {"files": {}}
    for file in files:
        try:
            found = store.sha256(store.join(checkpoint, file))
        except OSError as error:
            return _damaged(checkpoint, f"{file} cannot be read ({first_line(error)})")
        if found != marker["files"][file]["sha256"]:
            return _damaged(checkpoint, f"the content of {file} is not what was written")
    return None


def set_aside(checkpoint: str) -> None:
    """Rename the marker of a damaged checkpoint, so that it is not a checkpoint any more, but nothing is lost.

    The damage may be a fault of the storage that passes; whoever gives the marker its name back has the checkpoint.
    """
    marker = store.join(checkpoint, MARKER)
    if (content := store.read_text(marker)) is not None:
        store.write_text(store.join(checkpoint, _SET_ASIDE), content)
        store.delete(marker)


def remove_checkpoint(checkpoint: str) -> None:
    """Delete a checkpoint, its marker first, so that after a crash the rest does not count as a checkpoint.

    Files that are not part of a checkpoint stay, and so does what a link leads to.
    """
    filesystem, path = store.open_storage(checkpoint)
    if store.is_local(checkpoint) and Path(path).is_symlink():
        Path(path).unlink()
        return
    names = set((read_marker(checkpoint) or {"files": {}})["files"])
    store.delete(store.join(checkpoint, MARKER))
    for name in store.list_files(checkpoint):
        if name in names or _is_own(name):
            store.delete(store.join(checkpoint, name))
    is_empty = not store.list_files(checkpoint) and not store.list_directories(checkpoint)
    if is_empty and filesystem.get_file_info(path).type.name == "Directory":
        filesystem.delete_dir(path)


def _parse(name: str) -> tuple[int, int | None] | None:
    """Return (step, attempt) whose `checkpoint_name` is `name`; None for any other name."""
    match = re.fullmatch(r"step_([0-9]{8,})(?:-([1-9][0-9]*))?", name)
    if match is None:
        return None
    parsed = int(match[1]), int(match[2]) if match[2] else None
    return parsed if checkpoint_name(*parsed) == name else None


def _is_original(checkpoint: str, step: int, attempt: int | None) -> bool:
    marker = read_marker(checkpoint) or {}
    return marker.get("step", step) == step and attempt in (None, marker.get("attempt", attempt))


def _damaged(checkpoint: str, reason: str) -> str:
    warnings.warn(f"{redact(checkpoint)} is damaged and skipped: {reason}", stacklevel=3)
    return reason


def _identity(checkpoint: str) -> tuple[str, str | None]:
    """Return the name of the directory of the run that saved `checkpoint`, and its MLflow run."""
    marker = read_marker(checkpoint) or {}
    return marker.get("run", ""), marker.get("run_id")


def _has_marker(checkpoint: str) -> bool:
    filesystem, path = store.open_storage(store.join(checkpoint, MARKER))
    return bool(filesystem.get_file_info(path).is_file)


def _is_own(name: str) -> bool:
    """Whether a file of this name in a checkpoint's directory was written by a run, or by one that was killed."""
    match = _OWN_FILE.fullmatch(name)
    return match is not None and (match["partial"] is None or _is_own(match["partial"]))
