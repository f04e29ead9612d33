"""Small texts, each of which breaks one rule of a filter or keeps all, with the verdicts of datatrove 0.10.0.

`benchmarks/cleaning.py --peer` compares the verdicts on any texts with an installed datatrove.
"""

PARAGRAPH = (
    "The harbour of the town lies in the north, where ships have come to rest for many years. "
    "In spring, people walk along its walls and watch the boats that leave with the tide. "
    "Some of them bring home fish; others carry timber, salt or wool to places far away. "
    "At night a lamp is lit on the tower, and its light can be seen from the hills. "
    "Nobody remembers who built this tower, but every child knows how many steps it has."
)
SECOND = (
    "A baker opened his shop before dawn, because bread has to be warm when workers pass by. "
    "He mixed flour and water, let the dough rest, and told his daughter stories of old kings. "
    "Later that day, a stranger asked for directions to the mill, which stood empty. "
    "They spoke about rain, harvests, and the price of corn until the bell rang twice."
)
PROSE = f"{PARAGRAPH}\n{SECOND}"


def distinct(count):
    """Return as many different words of six letters."""
    letters = "bcdfghklmn"
    return ["".join(letters[int(digit)] for digit in f"{place:06d}") for place in range(count)]


def lines(text):
    """Return a text with each of its sentences on a line."""
    return text.replace(". ", ".\n")


# (filter, rule or '', text)
VERDICTS = [
    ("gopher_quality", "", PROSE),
    ("gopher_quality", "short_doc", " ".join(PROSE.split()[:40])),
    ("gopher_quality", "", " ".join(PROSE.split()[:60])),
    ("gopher_quality", "short_doc", "... !!! " * 60 + PARAGRAPH[:100]),
    ("gopher_quality", "long_doc", "the and with " * 34000),
    ("gopher_quality", "below_avg_threshold", "to be of an it is a b c d " * 20),
    ("gopher_quality", "above_avg_threshold", "the internationalisation of institutionalised " * 30),
    ("gopher_quality", "too_many_hashes", PARAGRAPH + " #" * 12),
    ("gopher_quality", "", PARAGRAPH + " #" * 9),
    ("gopher_quality", "too_many_ellipsis", PARAGRAPH.replace(" the ", " the... ") + " well…" * 12),
    ("gopher_quality", "too_many_bullets", "\n".join(f"- {line}" for line in lines(PROSE).split("\n"))),
    ("gopher_quality", "too_many_bullets", "\n".join(f"  • {line}" for line in lines(PROSE).split("\n"))),
    ("gopher_quality", "", lines(PROSE).replace("\n", "\n- ")),
    ("gopher_quality", "too_many_end_ellipsis", lines(PROSE).replace(".\n", "...\n", 4)),
    ("gopher_quality", "", lines(PROSE).replace(".\n", "...\n", 2)),
    ("gopher_quality", "below_alpha_threshold", PARAGRAPH + " 1234" * 30),
    ("gopher_quality", "enough_stop_words", " ".join(distinct(80))),
    ("gopher_quality", "enough_stop_words", " ".join(["The", "THE", "the", *distinct(80)])),
    ("gopher_quality", "", " ".join(["with", "that", *distinct(80)])),
    ("gopher_repetition", "", PROSE),
    ("gopher_repetition", "dup_para_frac", "\n\n".join(["abc", "abc", "abc", PROSE])),
    ("gopher_repetition", "", "\n\n\n".join(["abc", "abc", PARAGRAPH, SECOND])),
    ("gopher_repetition", "dup_para_char_frac", "\n\n".join([PARAGRAPH, PARAGRAPH, *distinct(9), SECOND])),
    ("gopher_repetition", "dup_line_frac", "\n".join(["abc", "abc", "abc", PROSE])),
    ("gopher_repetition", "dup_line_char_frac", "\n".join([PARAGRAPH, PARAGRAPH, *distinct(9), SECOND])),
    ("gopher_repetition", "top_2_gram", "one day " * 12 + " ".join(distinct(40))),
    ("gopher_repetition", "top_2_gram", "two words"),
    ("gopher_repetition", "", "oneword"),
    (
        "gopher_repetition",
        "top_3_gram",
        " ".join(f"of one day {word}" for word in distinct(12)) + " " + SECOND[:200],
    ),
    (
        "gopher_repetition",
        "top_4_gram",
        " ".join(f"of one day a {word}" for word in distinct(8)) + " " + PROSE[:330],
    ),
    ("gopher_repetition", "duplicated_5_n_grams", PARAGRAPH + " " + PARAGRAPH),
    ("gopher_repetition", "duplicated_6_n_grams", " ".join([*distinct(60), *distinct(12)])),
    ("gopher_repetition", "duplicated_10_n_grams", " ".join([*distinct(137), *distinct(20)])),
    ("gopher_repetition", "", " ".join([*distinct(100), *distinct(9)])),
    ("c4", "", PROSE),
    ("c4", "too_few_sentences", "\n".join(lines(PROSE).split("\n")[:4])),
    ("c4", "", "\n".join(lines(PROSE).split("\n")[:5])),
    ("c4", "lorem_ipsum", PROSE + "\nThis is Lorem Ipsum here."),
    ("c4", "curly_bracket", PROSE + "\nThis is a { here."),
    ("c4", "too_few_sentences", lines(PROSE).replace(".\n", "\n")),
    ("fineweb_c4", "", lines(PROSE).replace(".\n", "\n")),
    ("c4", "too_few_sentences", lines(PROSE).replace(".\n", "...\n")),
    ("fineweb_c4", "curly_bracket", lines(PROSE).replace(".\n", " {\n")),
    ("fineweb", "", PROSE),
    ("fineweb", "line_punct_ratio", lines(PROSE).replace(".\n", "\n")[:-1]),
    ("fineweb", "", lines(PROSE).replace(".\n", "\n").replace("tide\n", "tide。\n")),
    ("fineweb", "short_line_ratio", "\n".join(f"This is line {word}." for word in distinct(20))),
    ("fineweb", "char_dup_ratio", PROSE + "\nThis line is here twice, and it is long." * 2),
    ("fineweb", "", PROSE + "\nabcde." * 2),
    (
        "fineweb",
        "list_ratio",
        "\n\n\n".join(["a" * 31 + "."] * 1 + [f"{word * 6}." for word in distinct(12)]),
    ),
]
