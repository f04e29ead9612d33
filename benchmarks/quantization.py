"""What rounding the weights costs: perplexity on validation text, and memory.

``python benchmarks/quantization.py --checkpoint REF --data DIR`` computes the log-probabilities that the engine itself
reports for the text's tokens, with the weights as they are stored and in each quantised form.
"""

from __future__ import annotations

import math
import time
from argparse import ArgumentParser

import numpy as np
import torch

from llama_ray import Engine, SamplingParams
from llama_ray.data.loader import TokenDataset


def main() -> None:
    """Prints a table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument(
        "--data", required=True, help="What jobs/prepare_data.py wrote; its validation split is read."
    )
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    flags = parser.parse_args()
    print(f"{flags.checkpoint}, {flags.dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| weights | MiB | nats a token | perplexity | ratio | tokens/s |\n|---|---|---|---|---|---|")
    reference = None
    for quantization in (None, "int8", "int4"):
        engine = Engine.from_pretrained(
            flags.checkpoint, dtype=getattr(torch, flags.dtype), quantization=quantization
        )
        length = engine.max_seq_len - 1
        dataset = TokenDataset(flags.data, "validation")
        places = np.linspace(0, dataset.num_samples(length) - 1, flags.sequences, dtype=np.int64)
        prompts = dataset.samples(np.unique(places), length)[0].tolist()
        start = time.perf_counter()
        done = engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
        seconds = time.perf_counter() - start
        logprobs = [position.logprob for c in done for position in c.prompt_logprobs or ()]
        loss = -sum(logprobs) / len(logprobs)
        reference = reference or loss
        print(
            f"| {quantization or flags.dtype} | {engine.stats.weight_bytes / 2**20:.1f} | {loss:.4f} | "
            f"{math.exp(loss):.2f} | {math.exp(loss - reference):.4f} | {len(logprobs) / seconds:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
