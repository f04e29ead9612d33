import hashlib

import numpy as np
import pytest

from llama_ray.data.cleaning.duplicates.signatures import BANDS, exact_key, minima, runs_of_words, sign

LETTERS = str.maketrans("0123456789", "ghijklmnop")
"""Numbers are equal to each other; letters are not."""


def random_words(count, seed):
    return [
        hashlib.blake2b(f"{seed} {place}".encode(), digest_size=4).hexdigest().translate(LETTERS)
        for place in range(count)
    ]


def pair_of_similarity(similarity, seed, words=400):
    """Return two texts whose sets of runs of five words have about this Jaccard similarity, and the exact one."""
    common = round(words * 2 * similarity / (1 + similarity))
    a = random_words(common, seed) + random_words(words - common, f"{seed}a")
    b = a[:common] + random_words(words - common, f"{seed}b")
    runs = [set(zip(*(text[place:] for place in range(5)), strict=False)) for text in (a, b)]
    return " ".join(a), " ".join(b), len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def share_found(similarity, pairs=60):
    texts = [pair_of_similarity(similarity, seed) for seed in range(pairs)]
    assert all(abs(exact - similarity) < 0.02 for *_, exact in texts)
    return sum(bool((sign(a) == sign(b)).any()) for a, b, _ in texts) / pairs


def test_texts_that_share_nine_tenths_of_their_runs_are_found():
    assert share_found(0.9) == 1


def test_texts_that_share_three_tenths_are_not():
    assert share_found(0.3) == 0


def test_between_them_as_many_are_found_as_the_formula_says():
    # 1 - (1 - 0.7^8)^14 = 0.56; three standard deviations of 60 pairs are 0.19.
    assert abs(share_found(0.7) - 0.56) < 0.19


@pytest.mark.parametrize("similarity", [0.1, 0.5, 0.8])
def test_a_signature_estimates_the_similarity(similarity):
    estimates = []
    for seed in range(20):
        a, b, exact = pair_of_similarity(similarity, seed)
        estimates.append(np.mean(minima(runs_of_words(a)) == minima(runs_of_words(b))) - exact)

    # The mean of 20 estimates by 112 hash functions has a standard deviation of at most 0.011.
    assert abs(np.mean(estimates)) < 0.033


@pytest.mark.parametrize(
    "other",
    [
        "THE CAFE OPENED, IN 7 -- AND CLOSED AT 9!",
        "the café  opened in 1987\nand closed at 10.30",
        "“The” cafe\u0301 (opened) in 1,5 … and [closed] at 0",
    ],
)
def test_case_accents_numbers_punctuation_and_space_do_not_count(other):
    text = "The café opened in 1987, and closed at 10."

    assert np.array_equal(sign(text), sign(other))


@pytest.mark.parametrize("text", ["", " ", "...", "one", "one two three four", "你好世界，再见"])
def test_texts_without_five_words_are_signed_too(text):
    assert sign(text).shape == (BANDS,)
    assert np.array_equal(sign(text), sign(text))
    assert not (sign(text) == sign(text + " else")).any()


def test_a_long_text_is_signed_as_one():
    words = random_words(60_000, 0)
    text = " ".join(words)

    assert len(text) > 2 * 2**18
    assert np.array_equal(runs_of_words(text)[:100], runs_of_words(" ".join(words[:104])))
    assert len(runs_of_words(text)) == len(words) - 4


def test_exact_keys_ignore_case_and_white_space_only():
    assert exact_key("A  b\n") == exact_key("a b")
    assert len({exact_key(text) for text in ("a b", "a, b", "ab", "á b", "a 1", "a 2")}) == 6
    assert len(exact_key("")) == 16
