"""The training objective, and the head that computes it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100
"""A target with this value is not predicted and carries no loss."""

CHUNK_BYTES = 16 * 1024**2
"""fp32 logits that exist at once, at least; see `_chunk_tokens`."""


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Next-token negative log-likelihood in nats, summed over tokens, in fp32.

    `logits` [batch, seq, vocab] in any float dtype, `targets` int64 [batch, seq]. A sum, not a mean: the caller
    divides by the number of targets in the whole global batch, which one micro-batch does not know.
    """
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )


class Head(nn.Linear):
    """The matrix that turns hidden states into logits, or, given targets, straight into their loss."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        scale: Tensor | float = 1.0,
        z_loss: float = 0.0,
    ) -> Tensor:
        """[..., hidden_size] -> logits [..., vocab_size]; with `targets` what `head_loss` returns."""
        if targets is None:
            return super().forward(hidden)
        return head_loss(hidden, self.weight, targets, scale, z_loss)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor | float = 1.0,
    z_loss: float = 0.0,
) -> Tensor:
    """`cross_entropy_sum` of `hidden @ weight.T`, without ever holding the logits of all tokens.

    `hidden` [batch, seq, hidden_size], `weight` [vocab, hidden_size], `targets` int64 [batch, seq]. Returns fp32
    [2]: the objective to differentiate, which is the summed cross-entropy plus `z_loss` times the summed squares
    of the log-normalisers (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, section 5), and the summed
    cross-entropy alone, through which no gradient flows.

    Tokens go through in chunks, and the gradients of a chunk are computed while its logits are there, so nothing
    is computed twice. `scale` says what the objective will be multiplied with before `backward`; in bf16 and fp16
    the gradients are rounded at that scale, as they are when the logits are kept.
    """
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    kind = hidden.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    result: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, -2), weight, targets.flatten(), scale, z_loss, compute, differentiate
    )
    return result


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
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(compute)
            chunk = _chunk_tokens(weight)
            sums = torch.zeros(2, device=hidden.device)
            grad_hidden = torch.empty_like(hidden) if differentiate else None
            grad_weight: Tensor | None = None
            for start in range(0, len(targets), chunk):
                piece = slice(start, start + chunk)
                states, target = hidden[piece].to(compute), targets[piece]
                valid = (target != IGNORE).float()
                index = target.clamp(min=0).unsqueeze(1)
                logits = (states @ matrix.T).float()
                log_p = torch.log_softmax(logits, dim=1)
                log_p_target = log_p.gather(1, index)
                # log p = logit - log Z, so the normaliser needs no pass of its own over the vocabulary.
                log_z = ((logits.gather(1, index) - log_p_target).squeeze(1)) * valid
                del logits
                nll = -(log_p_target.squeeze(1) * valid).sum()
                sums += torch.stack((nll + z_loss * log_z.square().sum(), nll))
                if grad_hidden is not None:
                    # d nll / d logits = p - onehot(target);  d z_loss / d logits = 2 z_loss log Z p
                    rate = valid * scale
                    grad = log_p.exp_().mul_((rate * (1 + 2 * z_loss * log_z)).unsqueeze(1))
                    grad.scatter_add_(1, index, -rate.unsqueeze(1))
                    low = grad.to(compute)
                    del grad, log_p
                    grad_hidden[piece] = low @ matrix
                    part = low.T @ states
                    if grad_weight is None:
                        grad_weight = part.to(weight.dtype if len(targets) <= chunk else torch.float32)
                    else:
                        grad_weight += part
            ctx.scale = scale
            if grad_hidden is not None:
                if grad_weight is None:  # no tokens at all
                    grad_weight = torch.zeros_like(weight)
                ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        ratio = grads[0][0] / ctx.scale
        # In place, for they may be large; a second backward pass through the same graph is refused by autograd.
        return grad_hidden.mul_(ratio), grad_weight.mul_(ratio), None, None, None, None, None


def _chunk_tokens(weight: Tensor) -> int:
    """How many tokens share a chunk.

    Its fp32 logits take no more than the larger of CHUNK_BYTES and the fp32 weight itself, whose gradient is held
    anyway: with fewer tokens than `hidden_size` in a chunk, adding to that gradient would cost more than the
    products do.
    """
    vocab, hidden_size = weight.shape
    return max(CHUNK_BYTES // (4 * vocab), hidden_size)
