import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.data.cleaning.cleaner import Cleaner
from llama_ray.data.cleaning.config import CleanConfig
from llama_ray.data.cleaning.contamination import write_evaluations
from tests.data.cleaning.texts import PARAGRAPH, PROSE

GERMAN = "Der Bäcker öffnete seinen Laden vor Sonnenaufgang, weil das Brot warm sein muss, wenn die Arbeiter kommen."


@given(st.text())
@settings(max_examples=20, deadline=None)
def test_without_a_setting_a_text_stays_as_it_is(text):
    cleaned = Cleaner(CleanConfig())(text)

    assert (cleaned.text, cleaned.drops) == (text, ())


@pytest.mark.parametrize(("form", "text"), [("none", "e\u0301 ﬁ １"), ("nfc", "é ﬁ １"), ("nfkc", "é fi 1")])
def test_normal_forms(form, text):
    assert Cleaner(CleanConfig(unicode=form))("e\u0301 ﬁ １").text == text


def test_other_languages_are_dropped():
    clean = Cleaner(CleanConfig(language=("en", "fr")))

    assert clean(PARAGRAPH).text == PARAGRAPH
    assert clean(PARAGRAPH).language == "en"
    cleaned = clean(GERMAN)
    assert (cleaned.text, cleaned.language) == (None, "de")
    assert cleaned.drops[0].rule == "language"
    assert cleaned.drops[0].detail == "de with probability 1.00"
    assert Cleaner(CleanConfig(language=("de",)))(GERMAN).text == GERMAN


def test_a_language_must_be_likely_enough():
    text = "und so"
    drops = [
        Cleaner(CleanConfig(language=("de",), language_threshold=threshold))(text).drops
        for threshold in (0.0, 1.0)
    ]

    assert drops[0] == ()
    assert drops[1][0].rule == "language"


def test_the_language_of_some_texts_is_told_where_all_are_taken():
    clean = Cleaner(CleanConfig())
    languages = [clean(f"{number} {GERMAN}").language for number in range(640)]

    assert set(languages) == {"", "de"}
    assert 5 < languages.count("de") < 50


def test_white_space_passes_no_filter():
    assert Cleaner(CleanConfig(clean=("fineweb",)))(" \n ").drops[0].rule == "empty"


@pytest.fixture
def evaluations(tmp_path):
    (tmp_path / "quiz.jsonl").write_text(
        json.dumps({"question": PARAGRAPH[:200], "choices": ["One", {"text": "Another of the choices"}]})
        + "\n\n"
        + json.dumps({"question": "Too short?", "answer": 7})
        + "\n"
    )
    (tmp_path / "essay.txt").write_text(
        "An essay on " + " ".join(map(str.upper, "abcdefghijklmnopqrstuvwxyz"))
    )
    return [str(tmp_path / name) for name in ("quiz.jsonl", "essay.txt")]


def test_a_text_that_repeats_an_evaluation_is_dropped(tmp_path, evaluations):
    found = write_evaluations(evaluations, 13, tmp_path / "runs.npy")
    clean = Cleaner(CleanConfig(decontaminate=tuple(evaluations)), tmp_path / "runs.npy")
    run = "in the NORTH where   ships have come -- to rest for many years. In"
    cleaned = clean(f"He said: {run} the end.")

    assert (found.texts, found.too_short) == (2, 1)
    assert found.line().endswith(
        "of 2 texts, and 1 of fewer words, which are not looked for (--decontaminate_words)"
    )
    assert cleaned.text is None
    assert cleaned.drops[0].rule == "contaminated"
    assert (
        cleaned.drops[0].detail
        == "quiz.jsonl has it, too: in the north where ships have come to rest for many years in"
    )
    assert clean(f"He said: {run[:-3]} Of the end.").text is not None
    assert clean("They are a b c d e f g h i j k l m!").drops[0].detail.startswith("essay.txt has it")
    assert clean("They are a b c d e f g h i j k l n.").text is not None


def test_an_evaluation_is_found_in_texts_of_another_normal_form(tmp_path):
    (tmp_path / "quiz.txt").write_text("a ﬁne oﬃce of ﬂowers")
    write_evaluations([str(tmp_path / "quiz.txt")], 5, tmp_path / "runs.npy", "nfkc")
    config = CleanConfig(unicode="nfkc", decontaminate=(str(tmp_path / "quiz.txt"),), decontaminate_words=5)

    assert Cleaner(config, tmp_path / "runs.npy")("It was a ﬁne oﬃce of ﬂowers.").text is None


def test_the_fields_of_a_record_follow_each_other(tmp_path, evaluations):
    write_evaluations(evaluations, 5, tmp_path / "runs.npy")
    clean = Cleaner(
        CleanConfig(decontaminate=tuple(evaluations), decontaminate_words=5), tmp_path / "runs.npy"
    )

    assert clean("one Another of the choices").text is None
    assert clean("two Another of the choices").text is not None


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.txt", None, "cannot be read: No such file"),
        ("short.txt", b"only four words here", "no text has 13 words"),
        ("latin.txt", b"\xff\xfe", "neither text in UTF-8 nor JSONL"),
        ("broken.jsonl", b'{"a": ', "neither text in UTF-8 nor JSONL"),
    ],
)
def test_an_evaluation_that_cannot_be_used_is_refused(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)

    with pytest.raises(ValueError, match=reason) as error:
        write_evaluations([str(tmp_path / name)], 13, tmp_path / "runs.npy")
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clean": ("gopher",)}, "clean is 'gopher'; choose among gopher_quality, gopher_repetition, c4"),
        ({"clean": ("c4", "c4")}, "clean has c4 2 times"),
        ({"language_threshold": 1.5}, "language_threshold is 1.5"),
        ({"decontaminate_words": 3}, "decontaminate_words is 3; it must be at least 5"),
        ({"dedup": "fuzzy"}, "dedup is 'fuzzy'; choose none, exact or minhash"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        CleanConfig(**settings)


def test_an_unknown_language_is_refused_with_those_that_are_known():
    with pytest.raises(
        ValueError, match=r"language is 'english'; it must be a code of ISO 639.* de, .* en, "
    ):
        Cleaner(CleanConfig(language=("english",)))


def test_the_model_of_languages_is_loaded_at_first_use():
    code = (
        "import sys; from llama_ray.data.cleaning.cleaner import Cleaner;"
        "from llama_ray.data.cleaning.config import CleanConfig;"
        f"Cleaner(CleanConfig(clean=('c4',)))({PROSE!r}); sys.exit('py3langid' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
