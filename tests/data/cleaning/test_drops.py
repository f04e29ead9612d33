import json

from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.data.cleaning.drops import MAX_EXAMPLES, Drop, Drops

ADDED = st.lists(
    st.tuples(
        st.sampled_from(["web", "code"]),
        st.integers(0, 20).map(str),
        st.builds(
            Drop,
            rule=st.sampled_from(["a", "b"]),
            unit=st.sampled_from(["text", "line"]),
            count=st.integers(1, 5),
            characters=st.integers(0, 100),
            example=st.sampled_from(["x", "y"]),
        ),
    ),
    max_size=30,
)


@given(ADDED, st.integers(1, 5), st.randoms())
@settings(max_examples=40, deadline=None)
def test_parts_may_be_merged_in_any_order(added, parts, random):
    whole = Drops()
    for one in added:
        whole.add(*one)
    shares = [Drops() for _ in range(parts)]
    for one in random.sample(added, len(added)):
        random.choice(shares).add(*one)
    merged = Drops()
    for share in shares:
        merged.merge(Drops.from_json(json.loads(json.dumps(share.to_json()))))

    assert merged.to_json() == whole.to_json()


def test_counts_are_by_rule_source_and_unit():
    drops = Drops()
    for source, rule, count, characters in [
        ("web", "a", 1, 10),
        ("web", "a", 2, 5),
        ("code", "a", 1, 99),
        ("web", "b", 1, 1),
    ]:
        drops.add(source, "id", Drop(rule, "text", count, characters, "x"))

    rows = [(row.rule, row.source, row.count, row.characters) for row in drops.rows()]
    assert rows == [("a", "code", 1, 99), ("a", "web", 3, 15), ("b", "web", 1, 1)]


def test_examples_are_few_short_and_printable():
    drops = Drops()
    for number in range(100):
        drops.add("web", f"web/{number}", Drop("a", "text", 1, 9, f"\x1b[2J{number}\n" + "x" * 10**6, "why"))
    (row,) = drops.rows()

    assert len(row.examples) == MAX_EXAMPLES
    assert all(len(example.text) < 500 for example in row.examples)
    assert all(example.text.startswith(f"\\x1b[2J{example.id[4:]}\nxxx") for example in row.examples)
    # They are not just the first ones.
    assert {example.id for example in row.examples} != {"web/0", "web/1", "web/2"}
