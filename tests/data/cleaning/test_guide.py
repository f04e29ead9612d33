import re
from pathlib import Path

from llama_ray.data.cleaning.filters.named import FILTERS
from tests.data.cleaning.texts import VERDICTS

GUIDE = Path(__file__).parents[3] / "docs" / "data.md"


def test_the_guide_names_each_filter_and_its_rules():
    rows = dict(
        re.findall(r"^\| `(\w+)` \| (.*)$", GUIDE.read_text().partition("### Filters")[2], re.MULTILINE)
    )

    assert set(FILTERS) <= set(rows)
    for name, rule, _ in VERDICTS:
        row = rows["c4" if name == "fineweb_c4" else name]
        if not rule.startswith("duplicated"):
            assert f"`{rule}`" in row or not rule
