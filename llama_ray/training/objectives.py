"""What training minimises: the loss of tokens, or that of pairs of answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ray.data.dataset.batch import Batch
from llama_ray.model.attention.documents import DocumentAttention
from llama_ray.training.config import TrainConfig
from llama_ray.utils.targets import IGNORE_INDEX

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
"""What `PairObjective` measures beside its loss."""


class Objective(Protocol):
    """A loss that is a sum over something that rows have many of, such as tokens."""

    measures: tuple[str, ...]
    """Names of what is measured beside the loss, in the same unit of summation."""

    def counts(self, batch: Batch) -> Tensor:
        """Return int64 [batch]: how many each row has of what the loss is a sum over."""

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        attend: DocumentAttention | None,
        groups: Tensor | None,
        scale: Tensor | float = 1.0,
    ) -> Tensor:
        """Return fp32 [2 + groups + measures], sums over the batch.

        What is differentiated, the loss that is reported, that of each group (see `head_loss`), and the measures.
        """


@dataclass(frozen=True)
class TokenObjective:
    """The cross-entropy of the targets: see `head_loss`."""

    z_loss: float = 0.0
    measures: tuple[str, ...] = ()

    def counts(self, batch: Batch) -> Tensor:
        """See `Objective`: the targets."""
        return (batch.targets != IGNORE_INDEX).sum(1)

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        attend: DocumentAttention | None,
        groups: Tensor | None,
        scale: Tensor | float = 1.0,
    ) -> Tensor:
        """See `Objective`."""
        loss: Tensor = model(
            *(batch.inputs, batch.positions, attend),
            targets=batch.targets,
            scale=scale,
            z_loss=self.z_loss,
            groups=groups,
        )
        return loss


@dataclass(frozen=True)
class PairObjective:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

    The documents of a row are pairs, first the chosen answer, then the rejected one, each after the same prompt. With r
    the log-probability of an answer above that which the reference model gives it, the loss of a pair is
    -log sigmoid(beta (r_chosen - r_rejected)). With `length_normalize` each r is divided by the answer's number of
    tokens (Lambert et al. 2024, arXiv:2411.15124, section 5.1.2). The rewards that are measured are beta r.
    """

    beta: float
    length_normalize: bool = False
    measures: tuple[str, ...] = REWARDS

    def counts(self, batch: Batch) -> Tensor:
        """See `Objective`: the pairs."""
        return (_first_tokens(batch).sum(1)) // 2

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        attend: DocumentAttention | None,
        groups: Tensor | None,
        scale: Tensor | float = 1.0,
    ) -> Tensor:
        """See `Objective`. The host waits for the device, once for each micro-batch."""
        losses: Tensor = model(batch.inputs, batch.positions, attend, targets=batch.targets, each=True)
        with torch.autocast(losses.device.type, enabled=False):
            return self.of_token_losses(losses, batch, groups)

    def of_token_losses(self, losses: Tensor, batch: Batch, groups: Tensor | None = None) -> Tensor:
        """Return what `loss` does, from the negative log-likelihood of each token [batch, seq_len]."""
        pairs = self.counts(batch)
        most = int(pairs.max())
        first = _first_tokens(batch)
        document = first.cumsum(1) - 1
        # A product, because adding by index has no fixed order on a GPU.
        belongs = F.one_hot(document.clamp(min=0), max(2 * most, int(document.max()) + 1, 1)).float()

        def of_documents(values: Tensor) -> Tensor:
            sums = torch.einsum("bs,bsd->bd", values.float(), belongs)[:, : 2 * most]
            return sums.view(len(values), most, 2)

        reference = torch.zeros_like(losses) if batch.reference is None else batch.reference
        ratios = -of_documents(losses) - of_documents(reference)
        scores = ratios
        if self.length_normalize:
            scores = ratios / of_documents(batch.targets != IGNORE_INDEX).clamp(min=1)
        there = torch.arange(most, device=pairs.device) < pairs.unsqueeze(1)
        margins = self.beta * (scores[..., 0] - scores[..., 1])
        of_pairs = -F.logsigmoid(margins) * there
        chosen, rejected = (self.beta * ratios.detach() * there.unsqueeze(2)).unbind(2)
        measured = [chosen, rejected, chosen - rejected, (chosen > rejected) & there]
        of_rows = of_pairs.detach().sum(1)
        parts = [of_pairs.sum().view(1), of_rows.sum().view(1)]
        if groups is not None:
            parts.append(of_rows @ groups)
        return torch.cat([*parts, torch.stack([value.sum().float() for value in measured])])


def objective_of(config: TrainConfig) -> TokenObjective | PairObjective:
    """Return what a run of `config` minimises."""
    if config.task == "dpo":
        return PairObjective(config.dpo_beta, config.dpo_length_normalize)
    return TokenObjective(config.z_loss)


def _first_tokens(batch: Batch) -> Tensor:
    """Return bool [batch, seq_len]: whether a document begins there. Rows that are one text have none."""
    if batch.starts is None:
        return torch.zeros_like(batch.inputs, dtype=torch.bool)
    return batch.starts == torch.arange(batch.starts.shape[1], device=batch.starts.device)
