"""Conversations to token ids with the answers marked, beside transformers' `apply_chat_template`.

    TOKENIZERS_PARALLELISM=false python benchmarks/conversations.py SmolLM2-135M-Instruct.Q4_1.gguf

Both encode the same conversations, made of this repository's guides, in turns and in one thread each. Transformers gets
the masks from a template in which `{% generation %}` marks the answers. Ours finds them by rendered prefixes, in a
process of its own for the template, and checks each prompt. The ids and masks must be equal but for what the template
writes after the end of a turn.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path

from jsonargparse import auto_cli
from transformers import AutoTokenizer

from llama_ray.data.conversations.conversation import Conversation
from llama_ray.data.conversations.examples import ExampleEncoder, Refusal
from llama_ray.data.conversations.formats import read_conversation
from llama_ray.data.tokenizing.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
BATCH = 64
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPES = {
    "1 turn of 40 and 80 words": (1, 40),
    "4 turns of 60 and 120": (4, 60),
    "10 turns of 100 and 200": (10, 100),
}


def run(tokenizer: str, conversations: int = 256, rounds: int = 5) -> None:
    """Time both on conversations of several shapes.

    Args:
        tokenizer: A tokenizer with the special tokens of ChatML.
        conversations: Number of conversations of each shape.
        rounds: Runs of each; medians are told.
    """
    text = " ".join(path.read_text() for path in sorted(ROOT.glob("docs/*.md")))
    # Transformers takes the name of a special token in a message for the token.
    words = [word for word in text.split() if "<" not in word]
    ours = Tokenizer.load(tokenizer).with_chat_template(TEMPLATE)
    with tempfile.TemporaryDirectory() as directory:
        ours.save(directory)
        theirs = AutoTokenizer.from_pretrained(directory)
    plain = ours.with_chat_template(
        TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    )
    encoder = ExampleEncoder(plain, "2024-07-26T00:00:00")
    print("| conversations | tokens | ours a second | transformers a second | ratio |\n|---|---|---|---|---|")
    for name, (turns, length) in SHAPES.items():
        random.seed(0)
        made = [_made(words, turns, length) for _ in range(conversations)]
        encoder.encode(made[:1])
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(rounds):
            start = time.perf_counter()
            mine = [
                found
                for first in range(0, conversations, BATCH)
                for found in encoder.encode(made[first : first + BATCH])
            ]
            times["ours"].append(time.perf_counter() - start)
            start = time.perf_counter()
            peers = [
                theirs.apply_chat_template(
                    list(each.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
                )
                for each in made
            ]
            times["theirs"].append(time.perf_counter() - start)
        tokens = 0
        for found, peer in zip(mine, peers, strict=True):
            assert not isinstance(found, Refusal), found
            [example] = found
            tokens += len(example.ids)
            assert example.ids.tolist() == peer["input_ids"]
            assert example.learned.tolist() == list(map(bool, peer["assistant_masks"]))
        here, there = (conversations / statistics.median(times[who]) for who in ("ours", "theirs"))
        print(f"| {name} | {tokens / conversations:,.0f} | {here:,.0f} | {there:,.0f} | {here / there:.2f} |")


def _made(words: list[str], turns: int, length: int) -> Conversation:
    """Return a conversation of words that follow each other in the guides."""
    messages = []
    for _ in range(turns):
        for role, count in (("user", length), ("assistant", 2 * length)):
            start = random.randrange(len(words) - count)
            messages.append({"role": role, "content": " ".join(words[start : start + count])})
    return read_conversation({"messages": messages})


if __name__ == "__main__":
    auto_cli(run, as_positional=True)
