from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from llama_ray.storage.gguf import GgufError, read_gguf


@pytest.fixture
def file(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    writer.add_uint32("a.number", 7)
    writer.add_float32("a.fraction", 0.5)
    writer.add_bool("a.truth", True)
    writer.add_string("a.text", "naïve")
    writer.add_array("some.texts", ["a", "ü"])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.ones(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


def test_metadata_has_its_types(file: Path) -> None:
    header = read_gguf(file)
    assert header.get("a.number", int) == 7
    assert header.get("a.fraction", float) == 0.5
    assert header.get("a.truth", bool) is True
    assert header.get("a.text", str) == "naïve"
    assert header.get("some.texts", list) == ["a", "ü"]
    assert header.get("some.numbers", np.ndarray).tolist() == [1, 2, 3]
    assert header.get("not.there", int, 3) == 3


def test_tensors_are_where_ggufs_own_reader_finds_them(file: Path) -> None:
    tensors = read_gguf(file).tensors
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
        assert (tensor.offset, tensor.type) == (theirs[name].data_offset, theirs[name].tensor_type)
        assert tensor.shape == theirs[name].data.shape
    one = tensors["one"]
    assert np.fromfile(file, np.float32, one.size, offset=one.offset).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        ("a.text", int, "a.text is a str; it must be a int"),
        ("a.truth", int, "a.truth is a bool; it must be a int"),
        ("not.there", str, "has no not.there"),
    ],
)
def test_metadata_of_another_type_is_refused(file: Path, key: str, kind: type, message: str) -> None:
    with pytest.raises(GgufError, match=message):
        read_gguf(file).get(key, kind)


def test_a_file_that_is_cut_anywhere_in_its_header_is_refused(file: Path) -> None:
    content = file.read_bytes()
    end = read_gguf(file).tensors["one"].offset
    for size in range(4, end, 7):
        file.write_bytes(content[:size])
        with pytest.raises(GgufError, match=r"is damaged \(it ends too soon\); copy it again"):
            read_gguf(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no GGUF file"),
        (b"PK\3\4", "is no GGUF file"),
        (b"GGUF\1\0\0\0", "has version 1 of GGUF; it must be 2 or 3"),
        (b"GGUF\0\0\0\3", "has version 50331648 of GGUF; it must be 2 or 3"),
    ],
)
def test_other_files_are_refused(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    with pytest.raises(GgufError, match=message):
        read_gguf(file)
