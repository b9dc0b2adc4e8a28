"""Metrics: how high the documents that belong to a query stand among all, and how similarities follow scores."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

AT = 10
"""Number of results that nDCG looks at."""
RECALLS = (1, 5, 10)
CHUNK = 256
"""Number of queries whose scores are in memory at the same time."""


def retrieval_metrics(queries: Tensor, documents: Tensor, relevant: list[list[int]]) -> dict[str, float]:
    """Return recall@k and nDCG@10 (Järvelin & Kekäläinen, 2002, with binary relevance) of ranking by inner product.

    A document with the score of a relevant one counts as ranked above it, so that equal vectors gain nothing.

    Args:
        queries: [Q, d], normalised.
        documents: [D, d], normalised.
        relevant: the indices of each query's documents, at least one.

    Returns:
        "recall_at_K": mean share of a query's documents among its first K; "ndcg_at_10".
    """
    totals = dict.fromkeys((*(f"recall_at_{k}" for k in RECALLS), f"ndcg_at_{AT}"), 0.0)
    discounts = 1 / torch.arange(2, AT + 2, dtype=torch.float64).log2()
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK] @ documents.T
        for row, own in zip(scores, relevant[start : start + CHUNK], strict=True):
            rest = torch.ones(len(row), dtype=torch.bool)
            rest[own] = False
            others = row[rest]
            best = row[own].sort(descending=True).values
            ranks = torch.stack([(others >= score).sum() for score in best]) + torch.arange(len(best))
            for k in RECALLS:
                totals[f"recall_at_{k}"] += float((ranks < k).double().mean())
            gain = discounts[ranks[ranks < AT]].sum() / discounts[: len(best)].sum()
            totals[f"ndcg_at_{AT}"] += float(gain)
    return {name: value / len(queries) for name, value in totals.items()}


def similarity_metrics(first: Tensor, second: Tensor, scores: Tensor) -> dict[str, float]:
    """Return Spearman's and Pearson's correlation of cosine similarities with scores; 0 if either is constant.

    Args:
        first, second: [n, d], normalised.
        scores: [n].
    """
    from scipy.stats import pearsonr, spearmanr

    similarities, wanted = (first * second).sum(-1).double().numpy(), scores.double().numpy()
    varied = len(wanted) > 1 and np.ptp(wanted) > 0 and np.ptp(similarities) > 0
    functions = {"spearman": spearmanr, "pearson": pearsonr}
    return {
        name: float(function(similarities, wanted).statistic) if varied else 0.0 for name, function in functions.items()
    }
