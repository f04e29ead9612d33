"""Tokenise JSON Lines with `datasets.map`: python datasets_map.py CORPUS OUTPUT TOKENIZER WORKERS."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from datasets import load_dataset
from transformers import PreTrainedTokenizerFast

corpus, output, tokenizer_file, workers = sys.argv[1:]
tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file)
data = load_dataset(
    "json", data_files=sorted(map(str, Path(corpus).iterdir())), cache_dir=output, num_proc=int(workers)
)["train"]
tokens = data.map(
    lambda batch: {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
    batched=True,
    num_proc=int(workers),
    remove_columns=data.column_names,
)
print("texts", len(tokens))
