import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.data.cleaning.cleaner import Cleaner
from llama_ray.data.cleaning.config import CleanConfig
from llama_ray.data.cleaning.filters.named import FILTERS
from llama_ray.data.cleaning.filters.reading import Reading
from tests.data.cleaning.texts import PARAGRAPH, PROSE, VERDICTS, distinct, lines


@pytest.mark.parametrize(
    ("name", "rule", "text"),
    VERDICTS,
    ids=[f"{name}-{rule or 'passes'}-{place}" for place, (name, rule, _) in enumerate(VERDICTS)],
)
def test_the_verdict_is_that_of_datatrove(name, rule, text):
    assert FILTERS[name](Reading(text)).rule == rule


@given(
    st.text(st.sampled_from("ab .…-•#\n\t[1]{'\u3002你é\u0301\0")).filter(str.strip),
    st.sampled_from(sorted(FILTERS)),
)
@settings(deadline=None)
def test_any_text_gets_a_verdict(text, name):
    verdict = FILTERS[name](Reading(text))

    assert verdict.rule or verdict.text is None or verdict.text.strip() == verdict.text


@given(st.lists(st.sampled_from("abcde"), max_size=40), st.integers(5, 10))
@settings(deadline=None)
def test_repeated_runs_are_counted_from_left_to_right(letters, n):
    """The loop of the paper, word by word, against the limits that the filter keeps."""
    words = [letter * 3 for letter in letters] + distinct(30)
    text = " ".join(words)
    seen, place, repeated = set(), 0, 0
    while place <= len(words) - n:
        run = tuple(words[place : place + n])
        if run in seen:
            repeated += sum(map(len, run))
            place += n
        else:
            seen.add(run)
            place += 1
    limit = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}[n]
    rule = FILTERS["gopher_repetition"](Reading(text)).rule

    if repeated / len(text) > limit:
        assert rule
    elif rule.startswith("duplicated"):
        assert rule != f"duplicated_{n}_n_grams"


@pytest.mark.parametrize(
    "text", ["a. " * 10**5, "." + " " * 10**6 + ".", ". " * 10**5, '?"' * 10**5, "[1" * 10**5, "://" * 10**5]
)
def test_no_text_takes_a_time_that_grows_with_the_square_of_its_length(text):
    # Each of these takes a fraction of a second; minutes, if it were so.
    for name in FILTERS:
        FILTERS[name](Reading(text))


def test_c4_takes_lines_out_of_a_text():
    text = "\n".join(
        [
            "  " + PARAGRAPH,
            "A line without an end",
            "Two words.",
            "Enable JavaScript to see this.",
            "This site uses cookies, of course.",
            "Here a line trails off...",
            f"Of {'x' * 1001} letters.",
            "A fact [12] is cited here[edit].",
        ]
    )
    cleaned = Cleaner(CleanConfig(clean=("c4",)))(text)

    assert cleaned.text == f"{PARAGRAPH}\nA fact  is cited here."
    assert [(drop.rule, drop.unit, drop.count, drop.characters) for drop in cleaned.drops] == [
        ("c4/no_terminal_punc", "line", 2, 46),
        ("c4/too_few_words", "line", 1, 10),
        ("c4/javascript", "line", 1, 30),
        ("c4/policy", "line", 1, 34),
        ("c4/too_long_word", "line", 1, 1013),
    ]
    assert cleaned.drops[0].example == "A line without an end"


def test_lines_of_a_text_that_is_dropped_are_not_counted_as_well():
    text = "Two words.\n" + PARAGRAPH[:100]
    cleaned = Cleaner(CleanConfig(clean=("c4",)))(text)

    assert cleaned.text is None
    assert [(drop.rule, drop.unit, drop.characters) for drop in cleaned.drops] == [
        ("c4/too_few_sentences", "text", len(text))
    ]


def test_a_filter_reads_what_the_one_before_it_left():
    text = PROSE + "\nabc" * 40
    both = [("gopher_repetition", "c4"), ("c4", "gopher_repetition")]

    assert [Cleaner(CleanConfig(clean=names))(text).text for names in both] == [None, PROSE]


def test_the_detail_says_what_the_rule_saw():
    cleaned = Cleaner(CleanConfig(clean=("gopher_quality",)))("of the " * 24)
    assert cleaned.drops[0].detail == "48 words; at least 50"
    cleaned = Cleaner(CleanConfig(clean=("fineweb",)))(lines(PROSE).replace(".\n", "\n")[:-1])
    assert cleaned.drops[0].detail == "0 of the lines end with punctuation; at least 0.12"
