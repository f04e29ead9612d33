"""What quantised weights cost and save: perplexity on validation text, memory, and tokens/s.

    python benchmarks/quantization.py --checkpoint REF --data DIR

Needs a checkpoint and what `jobs/prepare_data.py` wrote with its tokenizer; a 5M model takes a minute on 2 cores. Uses
the log-probabilities that the engine reports for the text's tokens, with the weights as stored, in int8 and in int4.
"""

from __future__ import annotations

import math
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import numpy as np
import torch

from llama_ray import Engine, SamplingParams
from llama_ray.data.dataset.token_dataset import TokenDataset


def main() -> None:
    """Print one line of a table for each weight format."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="Reference of the model.")
    parser.add_argument(
        "--data", required=True, help="Data prepared by jobs/prepare_data.py; its validation split is read."
    )
    parser.add_argument("--sequences", type=int, default=64, help="Sequences to score.")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="The stored weights."
    )
    flags = parser.parse_args()
    print(f"{flags.checkpoint}, {flags.dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| weights | MiB | nats a token | perplexity | ratio | tokens/s |\n|---|---|---|---|---|---|")
    stored_loss = None
    for quantization in (None, "int8", "int4"):
        engine = Engine.from_pretrained(
            flags.checkpoint, dtype=getattr(torch, flags.dtype), quantization=quantization
        )
        length = engine.max_seq_len - 1
        dataset = TokenDataset(flags.data, "validation")
        indices = np.linspace(0, dataset.num_windows(length) - 1, flags.sequences, dtype=np.int64)
        prompts = dataset.windows(np.unique(indices), length, documents=False).inputs.tolist()
        start = time.perf_counter()
        done = engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
        seconds = time.perf_counter() - start
        logprobs = [position.logprob for c in done for position in c.prompt_logprobs or ()]
        loss = -sum(logprobs) / len(logprobs)
        stored_loss = stored_loss or loss
        print(
            f"| {quantization or flags.dtype} | {engine.stats.weight_bytes / 2**20:.1f} | {loss:.4f} | "
            f"{math.exp(loss):.2f} | {math.exp(loss - stored_loss):.4f} | {len(logprobs) / seconds:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
