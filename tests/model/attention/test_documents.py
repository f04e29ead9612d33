"""A packed row is its documents: for a whole model, and for what a GPU is given."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import varlen
from transformers import LlamaForCausalLM

from llama_ray.model.attention.document_blocks import document_attention, document_attention_backward
from llama_ray.model.attention.documents import (
    DocumentAttention,
    causal_varlen,
    document_borders,
    document_mask,
    masked_attention,
    packed_attention,
)
from llama_ray.model.llama import Llama
from llama_ray.utils.torch_private import mark_dynamic
from tests.model.attention.helpers import documents_of, heads, starts_of

CPU = torch.device("cpu")
# A row that begins inside a document looks like one that begins with it.
ROWS = [[5, 1, 1, 30], [40], [], [60, 16]]


def logits(model: Llama, tokens: Tensor, starts: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]) - starts
    return model(tokens, positions, DocumentAttention.of(starts, CPU, torch.float32))  # type: ignore[no-any-return]


@pytest.fixture
def packed(model: Llama) -> tuple[Tensor, Tensor]:
    """Tokens and starts of rows of the model's greatest length."""
    seq = model.config.max_seq_len
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (len(ROWS), seq), generator=generator)
    return tokens, starts_of(ROWS, seq)


def test_logits_of_a_packed_row_are_those_of_transformers_for_each_document(
    model: Llama, peer: LlamaForCausalLM, packed: tuple[Tensor, Tensor]
) -> None:
    tokens, starts = packed
    with torch.no_grad():
        ours = logits(model, tokens, starts)
        for row, begin, end in documents_of(starts):
            theirs = peer(tokens[row : row + 1, begin:end]).logits[0]
            torch.testing.assert_close(ours[row, begin:end], theirs, atol=1e-4, rtol=0)


def test_gradients_of_packed_rows_are_those_of_transformers_for_its_documents(
    model: Llama, peer: LlamaForCausalLM, packed: tuple[Tensor, Tensor]
) -> None:
    tokens, starts = packed
    ours = logits(model, tokens, starts)
    losses = []
    for row, begin, end in documents_of(starts):
        targets = tokens[row, begin + 1 : end]
        losses.append(F.cross_entropy(ours[row, begin : end - 1], targets, reduction="sum"))
        theirs = peer(tokens[row : row + 1, begin:end]).logits[0, :-1]
        F.cross_entropy(theirs, targets, reduction="sum").backward()
    torch.stack(losses).sum().backward()
    expected = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        other = expected[name if name.startswith("lm_head") else f"model.{name}"].grad
        torch.testing.assert_close(parameter.grad, other, atol=1e-3, rtol=1e-3)


def test_borders_of_a_batch_are_where_documents_begin_in_rows_laid_end_to_end() -> None:
    borders = document_borders(starts_of([[3, 1], [], [9]], 10))
    assert borders.tolist() == [0, 3, 4, 10, 20, 29, 30]
    assert borders.dtype is torch.int32


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_under_a_mask_equals_that_of_blocks(kv_heads: int) -> None:
    starts = starts_of([[7, 1, 60], [], [99]], 100)
    inputs = [heads((3, n, 100, 16), i) for i, n in enumerate((4, kv_heads, kv_heads))]
    masked = masked_attention(*inputs, document_mask(starts, torch.float32))
    blocks = document_attention(*inputs, starts)
    torch.testing.assert_close(masked, blocks, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(out.square().sum(), inputs) for out in (masked, blocks))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def by_document(query: Tensor, key: Tensor, value: Tensor, borders: Tensor) -> Tensor:
    """Attend as torch documents `varlen_attn` with window (-1, 0): [tokens, heads, head_dim] in documents."""
    edges, outputs = borders.tolist(), []
    for begin, end in pairwise(edges):
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    return torch.cat(outputs, 1).transpose(0, 1).contiguous()


@pytest.fixture(scope="module", autouse=True)
def kernel_on_cpu() -> None:
    """Give torch's operator, which has a kernel for GPUs only, one for CPUs."""

    def forward(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, same: Tensor, *options: Any) -> Any:
        assert borders.equal(same)
        assert options[:3] == (options[0], options[0], True)
        lse, state = torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)
        return by_document(q, k, v, borders), lse, state

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        # A kernel is not differentiated, so the gradients are those of blocks, for all documents in one row.
        starts = starts_of([rest[2].diff().tolist()], len(q))
        row = (x.transpose(0, 1).unsqueeze(0) for x in (grad, q, k, v))
        gradients = document_attention_backward(*row, starts)
        return tuple(x.squeeze(0).transpose(0, 1).contiguous() for x in gradients)

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_of_documents_laid_end_to_end_equals_that_of_blocks(kv_heads: int) -> None:
    starts = starts_of([[7, 1, 60], [], [99]], 100)
    inputs = [heads((3, n, 100, 16), i) for i, n in enumerate((4, kv_heads, kv_heads))]
    packed = packed_attention(*inputs, document_borders(starts), causal_varlen())
    blocks = document_attention(*inputs, starts)
    torch.testing.assert_close(packed, blocks, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(out.square().sum(), inputs) for out in (packed, blocks))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_another_number_of_documents_is_not_compiled_again() -> None:
    counter = CompileCounter()

    @torch.compile(backend=counter)
    def attend(attention: DocumentAttention) -> Tensor:
        return attention(0, *inputs)

    inputs = [heads((2, 2, 100, 16), i).detach() for i in range(3)]
    for rows in ([[], []], [[5], [7, 1]], [[1] * 99, [1] * 99]):
        borders = document_borders(starts_of(rows, 100))
        mark_dynamic(borders, 0)
        attend(DocumentAttention(borders=borders, varlen=causal_varlen()))
    assert counter.frame_count == 1
