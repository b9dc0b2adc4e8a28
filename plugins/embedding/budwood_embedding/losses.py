"""The losses of the vectors of an optimizer step. No shape depends on values, so that they also run in planning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from budwood_embedding.roles import ANCHOR, FIRST


def contrastive_loss(vectors: Tensor, roles: Tensor, texts: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Return the weighted mean over anchors of the cross-entropy of an anchor's positive among the documents.

    Args:
        vectors: [n, d]; a row's texts are adjacent: anchor, positive, negatives.
        roles: [n]: 0 anchor, 1 positive, 2 negative.
        texts: [n], equal for equal texts.
        weights: [n], of each text's row.
        temperature: divides the cosine similarities.
    """
    unit = F.normalize(vectors, dim=-1)
    scores = unit @ unit.T / temperature
    own = torch.arange(len(roles), device=roles.device)
    target = (own + 1).clamp(max=len(roles) - 1)
    same_document = texts[None, :] == texts[target][:, None]
    same_anchor = texts[:, None] == texts[None, :]
    other_positive = (same_anchor & (roles == ANCHOR)).roll(1, 1)  # the positive stands after its anchor
    anchors = roles == ANCHOR
    left_out = anchors[None, :] | ((same_document | other_positive) & (own[None, :] != target[:, None]))
    scores = scores.masked_fill(left_out & anchors[:, None], float("-inf"))
    losses = scores.logsumexp(-1) - scores.gather(1, target[:, None])[:, 0]
    shares = torch.where(anchors, weights, torch.zeros_like(weights)).to(losses.dtype)
    return (losses * shares).sum() / shares.sum()


def ranking_loss(vectors: Tensor, roles: Tensor, scores: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Return log(1 + Σ exp((s_i - s_j) / t)) over all pairs i and j where i has the lower score (Su, 2022, "CoSENT").

    s is the cosine similarity of a pair's texts. A term has the product of the pairs' weights as a factor.

    Args:
        vectors: [n, d]; a pair's texts are adjacent.
        roles: [n]: 3 first text, 4 second text.
        scores: [n], of each text's pair.
        weights: [n], of each text's pair.
        temperature: t.
    """
    unit = F.normalize(vectors, dim=-1)
    similarities = (unit * unit.roll(-1, 0)).sum(-1) / temperature  # of a first text with the second, which follows
    first = roles == FIRST
    ordered = (scores[:, None] < scores[None, :]) & first[:, None] & first[None, :]
    shares = weights.to(unit.dtype).log()
    terms = similarities[:, None] - similarities[None, :] + shares[:, None] + shares[None, :]
    terms = terms.masked_fill(~ordered, float("-inf")).flatten()
    return torch.cat([terms.new_zeros(1), terms]).logsumexp(0)
