"""Clean texts with datatrove, under the Python that has it: `python datatrove_cleaning.py TEXTS.jsonl`.

Prints a line of JSON: for each filter its seconds and its verdict on each text, and the seconds of MinHash signatures.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.text import split_into_parts

FILTERS = {
    "gopher_quality": GopherQualityFilter(),
    "gopher_repetition": GopherRepetitionFilter(),
    "c4": C4QualityFilter(),
    "fineweb_c4": C4QualityFilter(filter_no_terminal_punct=False),
    "fineweb": FineWebQualityFilter(),
}


def main() -> None:
    """Measure each filter."""
    texts = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    signature = MinhashDedupSignature("/tmp")
    signature.get_shingles(texts[0])
    seconds, verdicts = {}, {}
    for name, each in FILTERS.items():
        # Words of the last texts are kept.
        split_into_parts.cache_clear()
        documents = [Document(text=text, id=str(place)) for place, text in enumerate(texts)]
        started = time.process_time()
        results = [each.filter(document) for document in documents]
        seconds[name] = time.process_time() - started
        verdicts[name] = ["" if result is True else result[1].removeprefix("gopher_") for result in results]
    started = time.process_time()
    for text in texts:
        shingles = signature.get_shingles(text)
        if shingles.size:
            signature.get_signature(shingles)
    seconds["minhash"] = time.process_time() - started
    print(json.dumps({"seconds": seconds, "verdicts": verdicts}))


if __name__ == "__main__":
    main()
