import json

from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.data.report.statistics import MAX_SAMPLES, Document, Statistics

ADDED = st.lists(
    st.tuples(
        st.sampled_from(["web", "code"]),
        st.builds(
            Document,
            id=st.integers(0, 20).map(str),
            text=st.sampled_from(["", "x", "é\n\0"]),
            tokens=st.integers(2, 5000),
            language=st.sampled_from(["", "en", "de"]),
        ),
    ),
    max_size=30,
)


@given(ADDED, st.integers(1, 5), st.randoms())
@settings(max_examples=40, deadline=None)
def test_parts_may_be_merged_in_any_order(added, parts, random):
    whole = Statistics()
    for source, document in added:
        whole.add(source, [document])
    shares = [Statistics() for _ in range(parts)]
    for source, document in random.sample(added, len(added)):
        random.choice(shares).add(source, [document])
    merged = Statistics()
    for share in shares:
        merged.merge(Statistics.from_json(json.loads(json.dumps(share.to_json()))))

    assert json.dumps(merged.to_json()) == json.dumps(whole.to_json())


def test_documents_are_counted():
    statistics = Statistics()
    statistics.add(
        "web", [Document("1", "naïve", 511, "fr"), Document("2", "abc", 512), Document("3", "d", 1023, "fr")]
    )
    web = statistics.sources["web"]

    assert (web.documents, web.characters, web.bytes, web.tokens) == (3, 9, 10, 2046)
    assert web.lengths == {9: 1, 10: 2}
    assert web.length_tokens == {9: 511, 10: 1535}
    assert web.languages == {"fr": 2}


def test_samples_are_few_short_and_printable():
    statistics = Statistics()
    statistics.add("web", (Document(str(number), f"\x1b\n{number}" + "x" * 10**5, 9) for number in range(50)))
    samples = statistics.sources["web"].samples

    assert len(samples) == MAX_SAMPLES
    assert all(
        sample.text.startswith(f"\\x1b\n{sample.id}x") and len(sample.text) < 1000 for sample in samples
    )
