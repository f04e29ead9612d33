"""Tokenise JSON Lines with datatrove's local executor: python datatrove_local.py CORPUS OUTPUT TOKENIZER WORKERS."""

from __future__ import annotations

import os
import sys

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

corpus, output, tokenizer, workers = sys.argv[1:]

if __name__ == "__main__":
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(corpus, text_key="text"),
            DocumentTokenizer(
                f"{output}/tokens",
                tokenizer_name_or_path=tokenizer,
                eos_token="<|end_of_text|>",
                shuffle_documents=False,
            ),
        ],
        # datatrove divides files among tasks: two tasks a worker even out their sizes.
        tasks=2 * int(workers),
        workers=int(workers),
        logging_dir=f"{output}/logs",
    ).run()
