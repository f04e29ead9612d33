import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.data.cleaning.words import find_words, ngram_hashes, word_hash


def words_of(text, punctuation=True):
    words = find_words(text, punctuation)
    return [text[start : start + length] for start, length in zip(words.starts, words.lengths, strict=True)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \n\t\u00a0", []),
        ("one two\nthree", ["one", "two", "three"]),
        ('"Well," he said.', ['"', "Well", ",", '"', "he", "said", "."]),
        ("((a)) b!!", ["(", "(", "a", ")", ")", "b", "!", "!"]),
        ("it's don’t '90s", ["it", "'s", "don", "’t", "'", "90s"]),
        ("3.14 1,000 U.S. file.py", ["3.14", "1,000", "U.S", ".", "file.py"]),
        ("well-known and/or a=b", ["well", "-", "known", "and", "/", "or", "a", "=", "b"]),
        ("foo(bar) x_1 a@b.c", ["foo(bar", ")", "x_1", "a@b.c"]),
        ("(https://a-b.c/d-e?f=g) h-i", ["(", "https://a-b.c/d-e?f=g", ")", "h", "-", "i"]),
        ("wait... ... -- ####", ["wait", "...", "...", "--", "#", "#", "#", "#"]),
        ("你好 ひら カタ", ["你", "好", "ひ", "ら", "カタ"]),
        ("cafe\u0301 हिन्दी", ["cafe\u0301", "हिन्दी"]),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


def test_punctuation_may_count_as_white_space():
    assert words_of("(Well-known, it's 5% of x/y…)", punctuation=False) == [
        "Well",
        "known",
        "it",
        "s",
        "5",
        "of",
        "x",
        "y",
    ]


@given(st.text(st.sampled_from("ab1 .,'-/()\n你é")))
@settings(max_examples=50, deadline=None)
def test_words_are_all_of_a_text_but_its_white_space(text):
    assert "".join(words_of(text)) == "".join(text.split())


@given(st.lists(st.text(st.sampled_from("ab .'-("))))
@settings(max_examples=50, deadline=None)
def test_words_have_equal_hashes_if_they_are_equal(texts):
    pairs = {
        pair for text in texts for pair in zip(words_of(text), find_words(text).hashes.tolist(), strict=True)
    }

    assert len({word for word, _ in pairs}) == len({hash for _, hash in pairs}) == len(pairs)


def test_a_word_is_described():
    words = find_words("a1 12 ... _ , x-")

    assert words.alphabetic.tolist() == [True, False, False, False, False, True]
    assert words.content.tolist() == [True, True, False, False, False, True]


def test_a_long_text_has_the_words_of_its_parts():
    part = "Some words, 12 of them; naïve ones: 你好. " * 10
    text = part * 3000

    assert len(text) > 4 * 2**18
    assert words_of(text) == words_of(part) * 3000
    assert find_words(text).hashes.tolist() == find_words(part).hashes.tolist() * 3000


def test_a_long_text_without_white_space_is_cut():
    assert "".join(words_of("a" * 600_000)) == "a" * 600_000


def test_hashes_of_runs():
    text = "a b c a b d"
    runs = ngram_hashes(find_words(text).hashes, 2).tolist()

    assert len(runs) == 5
    assert runs[0] == runs[3]
    assert len(set(runs)) == 4
    assert len(ngram_hashes(find_words(text).hashes, 7)) == 0


def test_hashes_stay_as_they_are():
    # An interrupted preparation goes on with files that another version may have written.
    assert word_hash("word") == 469292593005166913
