"""What llama.cpp needs of a tokenizer: the vocabulary, what prompts begin with, what ends answers, chat templates."""

from __future__ import annotations

from collections.abc import Collection

from llama_ray.data.chat.template import DEFAULT, ChatPrompt
from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.foreign.to_gguf import PREFIX, to_gguf
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.storage.gguf import Value

_TEMPLATE = "tokenizer.chat_template"
# Where answers end for llama.cpp, whatever the metadata say.
_KNOWN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>")


def tokenizer_metadata(
    tokenizer: Tokenizer, rows: int, eos_ids: Collection[int]
) -> tuple[dict[str, Value], list[str]]:
    """Return the metadata of `tokenizer` for a model of `rows` tokens, and in what llama.cpp will differ.

    `eos_ids` are tokens that end an answer beside the tokenizer's own. Raises TokenizerError for a tokenizer that
    llama.cpp cannot have.
    """
    vocabulary, notes = to_gguf(tokenizer.to_json(), tokenizer.special_ids, rows)
    names = vocabulary[f"{PREFIX}tokens"]
    assert isinstance(names, list)
    # As the tokenizer has them: in the order of their ids, its own end of text first.
    ends = sorted({*eos_ids, *tokenizer.end_of_turn_ids()})
    ends = [id for id in dict.fromkeys([tokenizer.eos_id, *ends]) if id is not None and id < rows]
    if not ends:
        raise TokenizerError(
            "its tokenizer names no token that ends a text, and llama.cpp would take token 11 for it; name eos_token "
            "in its tokenizer_config.json"
        )
    eos = ends[0]
    bos = tokenizer.bos_id if tokenizer.bos_id is not None and tokenizer.bos_id < rows else eos
    added = tokenizer.encode_prompt("")
    if added not in ([], [bos], [eos], [bos, eos]):
        raise TokenizerError(
            f"its tokenizer puts {len(added)} tokens around a prompt; for llama.cpp they must be bos before it, eos "
            "behind it, or none"
        )
    adds_bos = added[:1] == [bos] and (bos != eos or added == [bos])
    if adds_bos and not _writes(tokenizer, names[bos]):
        notes.append(
            f"llama.cpp begins conversations with {names[bos]}, which the chat template does not write"
        )
    metadata: dict[str, Value] = {
        **vocabulary,
        f"{PREFIX}bos_token_id": bos,
        f"{PREFIX}eos_token_id": eos,
        f"{PREFIX}add_bos_token": adds_bos,
        f"{PREFIX}add_eos_token": added[-1:] == [eos] and bos != eos,
    }
    # Two of them can be given; others end answers by their names.
    others = sorted(ends[1:], key=lambda id: names[id] in _KNOWN_ENDS)
    for key, id in zip(("eot_token_id", "eom_token_id"), others, strict=False):
        metadata[f"{PREFIX}{key}"] = id
    notes += [
        f"llama.cpp does not end answers at {names[id]}" for id in others[2:] if names[id] not in _KNOWN_ENDS
    ]
    return metadata | _templates(tokenizer), notes


def _writes(tokenizer: Tokenizer, bos: str) -> bool:
    """Return whether conversations begin with `bos` as the chat template writes them, as far as there is one."""
    if tokenizer.chat_template is None or DEFAULT not in tokenizer.chat_template.templates:
        return True
    try:
        return tokenizer.render_chat(ChatPrompt([{"role": "user", "content": "a"}])).text.startswith(bos)
    except ValueError:
        # It wants other messages than these.
        return True


def _templates(tokenizer: Tokenizer) -> dict[str, Value]:
    if tokenizer.chat_template is None:
        return {}
    templates = dict(tokenizer.chat_template.templates)
    found: dict[str, Value] = {_TEMPLATE: templates.pop(DEFAULT)} if DEFAULT in templates else {}
    if templates:
        found["tokenizer.chat_templates"] = list(templates)
        found |= {f"{_TEMPLATE}.{name}": text for name, text in templates.items()}
    return found
