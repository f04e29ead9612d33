"""The training objective, and the output head that computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ray.utils.targets import IGNORE_INDEX

CHUNK_BYTES = 16 * 1024**2
"""fp32 logits of a chunk of tokens; more where `hidden_size` tokens need more, see `_chunk_tokens`."""

ChunkLoss = Callable[..., tuple[Tensor, Tensor, Tensor | None]]
"""Computes the loss of a chunk of tokens, that of each token, and the gradient; see `_chunk_loss`."""


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of the targets in nats, summed over tokens, in fp32.

    `logits` [batch, seq, vocab] in any float dtype, `targets` int64 [batch, seq]. It is a sum because the caller
    divides by the number of targets of the global batch, which a micro-batch does not know.
    """
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


class Head(nn.Linear):
    """The projection of hidden states to logits or, given targets, directly to their loss."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self._chunk_loss: ChunkLoss = _chunk_loss

    def compile_loss(self) -> None:
        """Fuse the operations of the loss around its matrix products, with torch.compile."""
        self._chunk_loss = torch.compile(_chunk_loss, dynamic=False)

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        scale: Tensor | float = 1.0,
        z_loss: float = 0.0,
        groups: Tensor | None = None,
        each: bool = False,
    ) -> Tensor:
        """[..., hidden_size] -> logits [..., vocab_size].

        With `targets`, the result of `head_loss`; with `each` too, that of `token_losses`.
        """
        if targets is None:
            return super().forward(hidden)
        if each:
            return token_losses(hidden, self.weight, targets, self._chunk_loss)
        return head_loss(hidden, self.weight, targets, scale, z_loss, groups, self._chunk_loss)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor | float = 1.0,
    z_loss: float = 0.0,
    groups: Tensor | None = None,
    chunk_loss: ChunkLoss | None = None,
) -> Tensor:
    """`cross_entropy_sum` of `hidden @ weight.T`, without the logits of all tokens in memory at once.

    `hidden` [batch, seq, hidden_size], `weight` [vocab, hidden_size], `targets` int64 [batch, seq]. Returns fp32 [2]:
    the objective, and the summed cross-entropy alone, through which no gradient flows. The objective is the summed
    cross-entropy plus `z_loss` times the summed squares of the log-normalisers (PaLM, Chowdhery et al. 2022,
    arXiv:2204.02311, section 5). With `groups`, fp32 [batch, number of groups] with a 1 where a row belongs to a group
    and else 0, the summed cross-entropy of each group follows: the result is [2 + number of groups].

    Tokens are processed in chunks. The gradients of a chunk are computed together with its loss, while its logits are
    in memory, so nothing is recomputed. `scale` is the factor that the objective will be multiplied by before
    `backward`: in bf16 and fp16 the gradients are rounded at that scale, as without chunks. `chunk_loss` replaces
    `_chunk_loss` by a compiled form of it.
    """
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    kind = hidden.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    result: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, -2),
        weight,
        targets.flatten(),
        scale,
        z_loss,
        compute,
        differentiate,
        None if groups is None else groups.repeat_interleave(targets.shape[1], dim=0),
        chunk_loss or _chunk_loss,
    )
    return result


def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_loss: ChunkLoss | None = None
) -> Tensor:
    """Negative log-likelihood of each target in nats, 0 where it is IGNORE_INDEX: fp32 [batch, seq].

    For losses that are not a sum over tokens. The arguments are those of `head_loss`. Tokens are processed in chunks;
    backward computes the logits of each chunk once more, because only then its gradient is known.
    """
    kind = hidden.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    result: Tensor = _TokenLosses.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, -2), weight, targets, compute, chunk_loss or _chunk_loss
    )
    return result


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, compute: torch.dtype, chunk_loss: ChunkLoss
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.compute, ctx.chunk_loss = compute, chunk_loss
        # Not a view of another tensor, of which FSDP would warn.
        losses = torch.empty(targets.shape, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(compute)
            for part, states, of in _chunks(weight, losses.view(-1), hidden, targets.flatten()):
                part.copy_(chunk_loss(states.to(compute), matrix, of, 1.0, 0.0, False)[1])
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(ctx.compute)
            of_hidden: list[Tensor] = []
            of_weight = torch.zeros(weight.shape, device=weight.device) if ctx.needs_input_grad[1] else None
            for part, of, rate in _chunks(weight, hidden, targets.flatten(), grads[0].flatten()):
                states = part.to(ctx.compute)
                _, _, grad = ctx.chunk_loss(states, matrix, of, rate, 0.0, True)
                of_hidden.append((grad @ matrix).to(hidden.dtype))
                if of_weight is not None:
                    of_weight += grad.T @ states
        return torch.cat(of_hidden), None if of_weight is None else of_weight.to(weight.dtype), *(None,) * 3


def _chunks(weight: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the chunks of tokens of all `tensors` together."""
    return zip(*(torch.split(tensor, _chunk_tokens(weight)) for tensor in tensors), strict=True)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor | float,
        z_loss: float,
        compute: torch.dtype,
        differentiate: bool,
        groups: Tensor | None,
        chunk_loss: ChunkLoss,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(compute)
            chunk = _chunk_tokens(weight)
            grad_dtype = weight.dtype if len(targets) <= chunk else torch.float32
            num_groups = 0 if groups is None else groups.shape[1]
            sums = torch.zeros(2 + num_groups, dtype=torch.float32, device=hidden.device)
            grad_hidden = torch.empty_like(hidden) if differentiate else None
            grad_weight: Tensor | None = None
            for start in range(0, len(targets), chunk):
                tokens = slice(start, start + chunk)
                states = hidden[tokens].to(compute)
                loss, nll, grad = chunk_loss(states, matrix, targets[tokens], scale, z_loss, differentiate)
                sums[:2] += loss
                if groups is not None:
                    # A product, because adding by index has no fixed order on a GPU.
                    sums[2:] += nll @ groups[tokens]
                if grad_hidden is not None and grad is not None:
                    grad_hidden[tokens] = grad @ matrix
                    if not weight.requires_grad:
                        continue
                    product = grad.T @ states
                    grad_weight = product.to(grad_dtype) if grad_weight is None else grad_weight.add_(product)
            ctx.scale = scale
            if grad_hidden is not None:
                if weight.requires_grad:
                    # Without tokens no chunk has set it.
                    grad_weight = (
                        torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
                    )
                ctx.save_for_backward(grad_hidden, grad_weight)
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        ratio = grads[0][0] / ctx.scale
        # In place, because they may be large. Autograd refuses a second backward pass through the same graph.
        of_weight = None if grad_weight is None else grad_weight.mul_(ratio)
        return grad_hidden.mul_(ratio), of_weight, *(None,) * 7


def _chunk_loss(
    states: Tensor,
    matrix: Tensor,
    targets: Tensor,
    scale: Tensor | float,
    z_loss: float,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss of a chunk of tokens: the objective and the summed cross-entropy [2], the cross-entropy of each token
    [tokens], and the gradient by the logits [tokens, vocab] if asked for.

    The gradient is that of the objective times `scale`, in the dtype of `states` [tokens, hidden_size].
    """
    valid = (targets != IGNORE_INDEX).float()
    index = targets.clamp(min=0).unsqueeze(1)
    logits = (states @ matrix.T).float()
    log_p = torch.log_softmax(logits, dim=1)
    log_p_target = log_p.gather(1, index)
    # log p = logit - log Z, so log Z needs no pass of its own over the vocabulary.
    log_z = ((logits.gather(1, index) - log_p_target).squeeze(1)) * valid
    del logits
    nll = -(log_p_target.squeeze(1) * valid)
    loss = torch.stack((nll.sum() + z_loss * log_z.square().sum(), nll.sum()))
    if not differentiate:
        return loss, nll, None
    # d nll / d logits = p - onehot(target);  d z_loss / d logits = 2 z_loss log Z p
    rate = valid * scale
    grad = log_p.exp_().mul_((rate * (1 + 2 * z_loss * log_z)).unsqueeze(1))
    grad.scatter_add_(1, index, -rate.unsqueeze(1))
    return loss, nll, grad.to(states.dtype)


def _chunk_tokens(weight: Tensor) -> int:
    """Tokens a chunk.

    A chunk's fp32 logits take at most CHUNK_BYTES or the size of the fp32 weight, whichever is larger: a gradient of
    the weight's size is in memory anyway, and with fewer than `hidden_size` tokens a chunk, adding to it would take
    longer than the matrix products.
    """
    vocab, hidden_size = weight.shape
    return max(CHUNK_BYTES // (4 * vocab), hidden_size)
