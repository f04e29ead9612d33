"""Data sets of the Hugging Face hub: `hf://NAME`, `hf://NAME/CONFIG`, `hf://NAME@REVISION`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from llama_ray.data.sources.data_sets import TRAIN, splits_by_name
from llama_ray.data.sources.files import File, SourceError, open_file
from llama_ray.data.sources.formats import Format, layout
from llama_ray.data.sources.hub_file import HUB, MISSING, hub_endpoint, hub_errors
from llama_ray.data.sources.left_out import DATA_SET_NOTES, HIDDEN, OTHER_SPLIT, LeaveOut, LeftOut
from llama_ray.data.sources.walk import matches
from llama_ray.utils.errors import first_line, printable

_CARD = "README.md"
_FRONT_MATTER = re.compile(r"\A\s*---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


class Address(NamedTuple):
    """What `hf://NAME[/CONFIG][@REVISION]` names; `config` is '' for the default one."""

    name: str
    config: str
    revision: str | None


def hub_files(uri: str, leave_out: LeaveOut) -> list[File]:
    """Return the files of a data set of the hub, as it is now: all are read from the same commit.

    The configuration is one that the data set's card declares, else a folder, a file or a glob in it. Where it has a
    split `train`, other splits are left out, and so is the text beside files of records. Needs the package
    huggingface_hub; the environment variables HF_TOKEN and HF_ENDPOINT hold. Raises SourceError.
    """
    address = parse(uri)
    try:
        files = _all_files(address)
    except (OSError, ValueError) as error:
        if str(error) == MISSING:
            raise SourceError(MISSING) from error
        raise SourceError(
            f"cannot read source {printable(uri)!r} ({first_line(error)}); check its name and the access to it "
            "(HF_TOKEN, `hf auth login`)"
        ) from error
    chosen, others = _of_config(uri, address.config, files)
    records = any(file.layout.format not in (Format.TEXT, None) for file in chosen)
    taken = []
    for file in chosen:
        if any(part.startswith(".") for part in file.name.split("/")):
            leave_out(LeftOut("file", HIDDEN, file.name))
        elif file.name in others:
            leave_out(LeftOut("file", OTHER_SPLIT, file.name))
        elif file.name == _CARD or (records and layout(file.name).format in (Format.TEXT, None)):
            leave_out(LeftOut("file", DATA_SET_NOTES, file.name))
        else:
            taken.append(file)
    return taken


def parse(uri: str) -> Address:
    """Take a URI apart; all names have an owner, but for some old ones, of which the URI is no more than the name."""
    rest, _, revision = uri.removeprefix(HUB).removeprefix("datasets/").strip("/").partition("@")
    revision, _, below = revision.partition("/")
    parts = [part for part in f"{rest}/{below}".split("/") if part]
    return Address("/".join(parts[:2]), "/".join(parts[2:]), revision or None)


def _all_files(address: Address) -> list[File]:
    with hub_errors():
        from huggingface_hub.hf_api import HfApi, RepoFile

        client = HfApi(endpoint=hub_endpoint())
        info = client.dataset_info(address.name, revision=address.revision)
        tree = client.list_repo_tree(info.id, repo_type="dataset", revision=info.sha, recursive=True)
        entries = [entry for entry in tree if isinstance(entry, RepoFile)]
    return [
        # The first digits of the hash of its content stand for when it was written.
        File(
            entry.path,
            HUB,
            f"datasets/{info.id}@{info.sha}/{entry.path}",
            entry.size,
            int(entry.blob_id[:14], 16),
        )
        for entry in entries
    ]


def _of_config(uri: str, config: str, files: list[File]) -> tuple[list[File], set[str]]:
    """Return the files of a configuration, and the names of those that are of another split than `train`."""
    declared = _configs(files)
    if not config and declared:
        defaults = [name for name, entry in declared.items() if name == "default" or entry.get("default")]
        if len(declared) > 1 and not defaults:
            names = printable(", ".join(declared))
            raise SourceError(
                f"{printable(uri)} has several configurations ({names}); give one of them, as in "
                f"{printable(uri)}/{printable(next(iter(declared)))}"
            )
        config = defaults[0] if defaults else next(iter(declared))
    if config in declared:
        patterns = _patterns(declared[config])
        chosen = [file for file in files if any(_is_of(file, each) for each in patterns.values())]
        if patterns.keys() > {TRAIN}:
            train = {file.name for file in chosen if _is_of(file, patterns[TRAIN])}
            return chosen, {file.name for file in chosen} - train
    else:
        chosen = [file for file in files if not config or _is_of(file, [config, f"{config}/**"])]
    if not chosen:
        names = f"one of {', '.join(declared)}, or " if declared else ""
        raise SourceError(
            f"{printable(uri)} has no configuration or file {printable(config)!r}; give {printable(names)}a folder, "
            "a file or a glob in it"
        )
    return chosen, splits_by_name([file.name for file in chosen])


def _configs(files: list[File]) -> dict[str, Mapping[str, object]]:
    """Return the configurations with files that the card of a data set declares, by name."""
    import yaml

    card = next((file for file in files if file.name == _CARD), None)
    if card is None:
        return {}
    with open_file(card.root, card.path) as stream:
        matter = _FRONT_MATTER.search(stream.read().decode(errors="replace"))
    try:
        declared = yaml.safe_load(matter[1]) if matter else None
    except yaml.YAMLError:
        return {}
    entries = declared.get("configs") if isinstance(declared, dict) else None
    return {
        str(entry.get("config_name", "default")): entry
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and entry.get("data_files")
    }


def _patterns(entry: Mapping[str, object]) -> dict[str, list[str]]:
    """Return the globs of each split; https://huggingface.co/docs/hub/datasets-manual-configuration."""
    given = entry.get("data_files")
    if isinstance(given, dict):
        given = [{"split": split, "path": path} for split, path in given.items()]
    patterns: dict[str, list[str]] = {}
    for each in given if isinstance(given, list) else [given]:
        split, path = (str(each.get("split", "")), each.get("path")) if isinstance(each, dict) else ("", each)
        folder = PurePosixPath(str(entry.get("data_dir") or "."))
        paths = path if isinstance(path, list) else [path]
        patterns.setdefault(split, []).extend(str(folder / str(one)) for one in paths)
    return patterns


def _is_of(file: File, patterns: Iterable[str]) -> bool:
    parts = tuple(file.name.split("/"))
    return any(matches(parts, PurePosixPath(pattern).parts) for pattern in patterns)
