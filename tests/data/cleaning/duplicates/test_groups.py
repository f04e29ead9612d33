import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.data.cleaning.duplicates.groups import Duplicates, UnionFind, resolve
from llama_ray.data.cleaning.duplicates.keys import keys_of, write_keys
from llama_ray.data.cleaning.duplicates.pairs import find_pairs, plan, text_number

NUMBERS = st.integers(0, 30)
PARTS = st.lists(st.lists(st.sampled_from("abcdef"), max_size=5), min_size=1, max_size=4)


def smallest_connected(pairs):
    """Return the smallest number that each number is connected with, by going through the pairs again and again."""
    smallest = {number: number for pair in pairs for number in pair}
    for _ in range(len(smallest)):
        for a, b in pairs:
            smallest[a] = smallest[b] = min(smallest[a], smallest[b])
    return smallest


@given(st.lists(st.tuples(NUMBERS, NUMBERS)), st.integers(1, 4), st.randoms())
@settings(max_examples=50, deadline=None)
def test_of_what_pairs_connect_the_smallest_stays(pairs, calls, random):
    smallest = smallest_connected(pairs)
    random.shuffle(pairs)
    union = UnionFind()
    for call in range(calls):
        union.add(np.array(pairs[call::calls], np.uint64).reshape(-1, 2))

    assert union.dropped().tolist() == [[a, b] for a, b in sorted(smallest.items()) if a != b]


def duplicates_by_files(folder, method, parts, range_texts):
    """Return what to leave out of each part, found by way of the files."""
    files = [folder / f"{part}.npy" for part in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        write_keys(file, [keys_of(text, method) for text in part], method)
    spans = plan(files, range_texts)
    outputs = [folder / f"pairs-{index}.npy" for index in range(len(spans))]
    for span, output in zip(spans, outputs, strict=True):
        find_pairs(files, span, output)
    resolve(outputs[::-1], folder / "duplicates.npy")
    duplicates = Duplicates(folder / "duplicates.npy")
    return [duplicates.of_part(part) for part in range(len(parts))]


@given(PARTS, st.integers(2, 30))
@settings(max_examples=30, deadline=None)
def test_the_first_of_equal_texts_stays_however_the_keys_are_divided(tmp_path_factory, parts, range_texts):
    first, expected = {}, []
    for number, part in enumerate(parts):
        expected.append({})
        for row, text in enumerate(part):
            if text in first:
                expected[-1][row] = first[text]
            first.setdefault(text, text_number(number, row))

    assert duplicates_by_files(tmp_path_factory.mktemp("keys"), "exact", parts, range_texts) == expected


@pytest.mark.parametrize("range_texts", [2, 100])
def test_near_duplicates_of_near_duplicates_are_one_group(tmp_path, range_texts):
    # Each text shares nine tenths of its words with the next one.
    words = [chr(0x4E00 + place) for place in range(200)]
    texts = ["".join(words[start : start + 100]) for start in (0, 4, 8, 12, 16, 150)]
    found = duplicates_by_files(tmp_path, "minhash", [texts[2:4], [], texts[:2] + texts[4:]], range_texts)

    assert found == [{1: 0}, {}, {0: 0, 1: 0, 2: 0}]


def test_each_pair_is_found_in_one_range_of_a_band(tmp_path):
    texts = [str(number % 100) for number in range(300)]
    write_keys(tmp_path / "keys.npy", [keys_of(text, "exact") for text in texts], "exact")
    spans = plan([tmp_path / "keys.npy"], range_texts=20)
    pairs = [find_pairs([tmp_path / "keys.npy"], span, tmp_path / "pairs.npy") for span in spans]

    assert len(spans) == 15
    assert sum(pairs) == 200
    assert max(pairs) < 50


def test_a_key_at_the_end_of_a_range_belongs_to_one(tmp_path):
    keys = [np.array([key], np.uint64) for key in (0, 2**63 - 1, 2**63, 2**64 - 1)]
    write_keys(tmp_path / "keys.npy", keys * 2, "minhash")
    found = []
    for span in plan([tmp_path / "keys.npy"], range_texts=4):
        find_pairs([tmp_path / "keys.npy"], span, tmp_path / "pairs.npy")
        found.append(np.load(tmp_path / "pairs.npy").tolist())

    assert found == [[[0, 4], [1, 5]], [[2, 6], [3, 7]]]
