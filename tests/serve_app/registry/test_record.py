from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from serve_app.registry.facts import Rejection, Remembered
from serve_app.registry.record import FileStore, Record
from tests.serve_app.registry.helpers import version

REMEMBERED = Remembered(version(7), version(8), (version(6),), (Rejection(version(9), "loss is nan"),))


def record(
    *folders: Path, application: str = "default", uri: str = "http://mlflow:5000", deployed: str = "1"
) -> Record:
    stores: Sequence[FileStore] = [FileStore(folder) for folder in folders]
    return Record(stores, application=application, tracking_uri=uri, deployed=deployed)


def test_what_is_kept_is_read_as_it_was(tmp_path: Path) -> None:
    assert record(tmp_path).read("llama") is None
    record(tmp_path).write("llama", REMEMBERED)
    assert record(tmp_path).read("llama") == REMEMBERED
    # A password that changes is of the same registry.
    assert record(tmp_path, uri="http://somebody:secret@mlflow:5000").read("llama") == REMEMBERED


def test_models_registries_and_applications_are_told_apart(tmp_path: Path) -> None:
    record(tmp_path).write("llama", REMEMBERED)
    assert record(tmp_path).read("other") is None
    assert record(tmp_path, uri="http://other:5000").read("llama") is None
    assert record(tmp_path, application="other").read("llama") is None


def test_another_deployment_forgets_what_was_rejected(tmp_path: Path) -> None:
    record(tmp_path).write("llama", REMEMBERED)
    kept = record(tmp_path, deployed="2").read("llama")
    assert kept is not None
    assert (kept.current, kept.rejected) == (version(7), ())


def test_the_newest_of_several_stores_is_read_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    record(one, two).write("llama", Remembered(version(6)))
    record(two).write("llama", Remembered(version(7)))
    assert record(one, two).read("llama") == Remembered(version(7))
    [file] = two.iterdir()
    file.write_text(file.read_text()[:-20])
    assert record(one, two).read("llama") == Remembered(version(6))
    [file] = one.iterdir()
    file.write_text("[]")
    assert record(one, two).read("llama") is None


def test_a_store_that_cannot_be_written_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    record(tmp_path / "file", tmp_path / "folder").write("llama", REMEMBERED)
    assert record(tmp_path / "folder").read("llama") == REMEMBERED
