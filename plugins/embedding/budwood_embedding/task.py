"""The task of embeddings: vectors of texts, trained so that texts that belong together are close."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from budwood import (
    Batch,
    Column,
    Dropped,
    Encoded,
    Encoder,
    Example,
    InputError,
    LossTerm,
    Options,
    Outputs,
    Plan,
    Run,
    Step,
    TextTask,
    as_probe,
    eval_results,
    hookimpl,
    is_causal,
    takes_segments,
)
from budwood_embedding.config import read_kind, read_settings, settings_files
from budwood_embedding.formats import NAME, Texts
from budwood_embedding.retrieval import retrieval_metrics

TEXT = "embedding_text"
"""Column with a number for each text, the same for equal texts."""
ANCHOR, POSITIVE, NEGATIVE = range(3)
"""Labels: the role of a text in its row."""
ROLES = ("anchor", "positive", "negative")


class EmbeddingOptions(Options):
    """Options of `embedding`. What is not set is read from the base if it is one of sentence-transformers."""

    pooling: Literal["mean", "cls", "last"] | None = Field(
        None, description="how tokens become a vector; by default as the base says, else mean, or last for a decoder"
    )
    normalize: bool | None = Field(
        None,
        description="give vectors length 1; by default as the base says, else true. Training always compares angles",
    )
    query_prompt: str | None = Field(None, description="text before every anchor or query; by default as the base says")
    document_prompt: str | None = Field(None, description="text before every document; by default as the base says")
    temperature: float = Field(0.05, gt=0, le=10, description="temperature of the softmax over cosine similarities")
    matryoshka: list[int] = Field(
        [], description="also train the first so many dimensions, such as [256, 64], so that vectors can be cut"
    )

    @field_validator("matryoshka")
    @classmethod
    def _check_dimensions(cls, value: list[int]) -> list[int]:
        if any(size < 1 for size in value) or len(set(value)) < len(value):
            raise ValueError("must be different numbers of at least 1")
        return sorted(value, reverse=True)


class Embedding(TextTask):
    """Vectors of texts: the anchor of a row is close to its positive and far from all other documents of the step.

    The loss is the cross-entropy of an anchor's positive among all documents of the optimizer step, positives and hard
    negatives, by cosine similarity over a temperature (van den Oord et al., 2018, equation 4; in-batch negatives as in
    Karpukhin et al., 2020, section 3.2). A document equal to the positive, and another positive of an equal anchor, is
    no negative. With `matryoshka`, it is the mean over the cut vectors too (Kusupati et al., 2022, equation 1).
    """

    api = 2
    name = NAME
    auto_class = "AutoModel"
    Options = EmbeddingOptions
    unused_modules = ("pooler",)
    training_options = ("temperature", "matryoshka")
    peft_task_type = "FEATURE_EXTRACTION"
    best_metric = "eval_ndcg_at_10"
    lower_is_better = False

    def read_base(self, folder: Path) -> None:
        """Complete the options from the files of sentence-transformers, or by the kind of the model."""
        given = self.options.model_dump(exclude_none=True)
        found = read_settings(folder, pools="pooling" not in given)
        defaults = {"normalize": True, "query_prompt": "", "document_prompt": ""}
        options = {**defaults, **found, **given}
        if "pooling" not in options:
            options["pooling"] = "last" if is_causal(read_kind(folder)) else "mean"
        self.options = EmbeddingOptions(**options)

    def planned_row(self, text: str, number: int) -> dict[str, Any]:
        """Return an anchor and its positive, which differ from those of other rows."""
        word = ascii_lowercase[number % 26]
        return {"anchor": f"{word} {text}", "positive": f"{word} {text}"}

    def encode(self, items: Sequence[Any], where: Sequence[str], encoder: Encoder) -> list[Encoded | Dropped]:
        """See `Task.encode`. A row is a group: the anchor, its positive, and its negatives; each has one label."""
        before = (self.options.query_prompt or "", self.options.document_prompt or "")
        texts = [before[index > 0] + text for item in items for index, text in enumerate(_texts(item))]
        rows = iter(zip(texts, encoder.whole(texts), strict=True))
        results: list[Encoded | Dropped] = []
        for item in items:
            examples, cut = [], 0
            for index, _ in enumerate(_texts(item)):
                text, ids = next(rows)
                beyond = max(len(ids) - (encoder.max_length or len(ids)), 0)
                if beyond:
                    cut, ids = cut + beyond, encoder.cut(text, encoder.max_length or 0)
                examples.append(_example(ids, min(index, NEGATIVE), item.weight))
            results.append(Encoded(examples, cut))
        return results

    def packs_rows(self, model: nn.Module) -> bool:
        """Return whether the model takes positions and the boundaries of examples."""
        return is_causal(model.config) or takes_segments(model)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run the model and pool each example's tokens to a vector: `hidden` is [1, examples, d]."""
        hidden = model(**self.body_inputs(model, batch, is_causal(model.config))).last_hidden_state
        return Outputs(self.pool(hidden, batch)[None], lambda rows: rows)

    def own_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the vector of the batch's example, by the model's own forward."""
        hidden = model(input_ids=batch.inputs["input_ids"]).last_hidden_state
        return self.finish(self.pool(hidden, batch))

    def logits(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the examples' vectors [L, d]."""
        return self.finish(super().logits(outputs, batch))

    def finish(self, vectors: Tensor) -> Tensor:
        """Return pooled vectors as they are used: of length 1, if `normalize` is set."""
        return F.normalize(vectors, dim=-1) if self.options.normalize else vectors

    def pool(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return [examples, d], in fp32 or wider, of hidden states [rows, width, d]."""
        flat = hidden.flatten(0, 1)
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        lengths = torch.tensor(batch.lengths, device=flat.device)
        if self.options.pooling == "mean":
            owner = batch.example_of_position + 1  # 0 is padding
            sums = flat.new_zeros(len(batch.keys) + 1, flat.shape[-1]).index_add(0, owner, flat)[1:]
            return sums / lengths[:, None]
        packed = bool(batch.segments)
        first = torch.tensor(batch.segments[:-1] if packed else range(0, batch.rows * batch.width, batch.width))
        first = first.to(flat.device)
        return flat[first if self.options.pooling == "cls" else first + lengths - 1]

    def has_log_probs(self) -> bool:
        """Return False: a vector is no distribution."""
        return False

    def loss_is_log_prob(self) -> bool:
        """Return False."""
        return False

    def show(self, example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
        """Return the text with its role."""
        role = ROLES[int(example.labels[0])]
        return [(f"{role}: ", False), (tokenizer.decode(example.inputs["input_ids"].tolist()), True)]

    def probe(self, example: Example, limit: int | None = None) -> Example:
        """See `Task.probe`. A text is cut at its end."""
        return as_probe(example.inputs["input_ids"][:limit])

    # Checks before the base loads.

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        """Refuse an encoder-decoder, and more dimensions than the base's vectors have."""
        if plan.model is None:
            return
        config: Any = plan.model.config
        if getattr(config, "is_encoder_decoder", False):
            plan.problem(self, f"'{config.model_type}' is an encoder-decoder: take an encoder or a decoder")  # type: ignore
        width = getattr(config.get_text_config(), "hidden_size", None)
        too_many = [size for size in self.options.matryoshka if width and size >= width]
        if too_many:
            plan.problem(self, f"matryoshka: {too_many[0]} is not below the {width} dimensions of the base")  # type: ignore

    @hookimpl
    def prepare_examples(self, run: Run, examples: Sequence[Example]) -> Sequence[Example]:
        """Refuse data whose steps hold no negatives: single rows without hard ones, or one document alone.

        Raises:
            InputError: the message says what to change.
        """
        documents: set[int] = set()
        alone, hard = run.recipe.train.batch_examples == 1, True
        for example in examples:
            role = int(example.labels[0])
            if role == ANCHOR:
                if (alone and not hard) or (not alone and len(documents) > 1):
                    break
                hard = False
            else:
                hard = hard or role == NEGATIVE
                documents.add(int(example.columns[TEXT].values))
        if alone and not hard:
            raise InputError(
                f"{run.recipe.where('train', 'batch_examples')}: train.batch_examples: 1: the other rows of a step are "
                "an anchor's negatives, and a row without a 'negative' of its own would have none: raise it."
            )
        if len(documents) < 2:
            raise InputError(f"{run.recipe.data.train}: all rows have the same document, so no anchor has a negative.")
        return examples

    # Loss.

    @hookimpl
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> None:
        """Return nothing: the loss is that of the optimizer step."""

    @hookimpl
    def step_values(self, step: Step, outputs: Outputs) -> dict[str, Tensor]:
        """Return the vectors [examples, d], and each text's role, number and weight."""
        batch = step.batch
        rows = outputs.hidden.flatten(0, 1)
        return {"vectors": rows, "roles": batch.labels, "texts": batch.columns[TEXT], "weights": batch.weights}

    @hookimpl
    def step_terms(self, run: Run, values: dict[str, Tensor]) -> LossTerm:
        """Return the loss over all rows of the optimizer step."""
        cuts = [values["vectors"].shape[-1], *self.options.matryoshka]
        losses = [
            contrastive_loss(
                values["vectors"][:, :size],
                values["roles"],
                values["texts"],
                values["weights"],
                self.options.temperature,
            )
            for size in cuts
        ]
        return LossTerm(NAME, torch.stack(losses).mean(), "step", run.task_weight)

    # Evaluation and use.

    def measure(self, run: Run, noise: Callable[[Batch], Tensor | None] | None = None) -> dict[str, float]:
        """Return the loss and the metrics of retrieval: each anchor against all documents of `run.eval_examples`."""

        def vectors_of(batch: Batch) -> list[tuple[Any, Tensor, int, int, float]]:
            with self.noisy(run.model, None if noise is None else noise(batch)):
                vectors = self.outputs(run.model, batch).hidden[0].cpu()
            values = (batch.labels.tolist(), batch.columns[TEXT].tolist(), batch.weights.tolist())
            return list(zip(batch.source_rows, vectors, *values, strict=True))

        texts = [text for part in eval_results(run, vectors_of) for text in part]
        texts.sort(key=lambda text: (text[0], text[2]))  # independent of batches and processes
        roles, numbers = (torch.tensor([text[index] for text in texts]) for index in (2, 3))
        weights = torch.tensor([text[4] for text in texts])
        vectors = torch.stack([text[1] for text in texts])
        metrics: dict[str, float] = {}
        for size in (vectors.shape[-1], *self.options.matryoshka):
            cut = F.normalize(vectors[:, :size], dim=-1)
            loss = contrastive_loss(cut, roles, numbers, weights, self.options.temperature)
            found = {"loss": float(loss), **_retrieval(cut, roles.tolist(), numbers.tolist())}
            metrics |= {f"eval_{key}{f'_dim_{size}' if metrics else ''}": value for key, value in found.items()}
        return metrics

    def embed(self, model: nn.Module, tokenizer: Any, texts: Sequence[str], *, batch: int = 32) -> Tensor:
        """Return the vectors of texts, [texts, d] fp32 on the CPU, without a prompt before them.

        Args:
            model: in evaluation mode, with the adapter in use.
            batch: number of texts that are computed at once.

        Raises:
            InputError: a text is empty.
        """
        empty = next((number for number, text in enumerate(texts, 1) if not text.strip()), 0)
        if empty:
            raise InputError(f"text {empty} is empty.")
        rows = self.read_texts(model, tokenizer, texts)
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        width, device = model.config.get_text_config().hidden_size, next(model.parameters()).device
        vectors = torch.empty(len(rows), width)
        with torch.no_grad():
            for start in range(0, len(order), batch):
                chosen = order[start : start + batch]
                part = self.collate([as_probe(rows[index]) for index in chosen], model, tokenizer, False).to(device)
                hidden = model(**self.body_inputs(model, part, is_causal(model.config))).last_hidden_state
                vectors[chosen] = self.finish(self.pool(hidden, part)).float().cpu()
        return vectors

    def respond(self, model: nn.Module, tokenizer: Any, texts: Sequence[str], labels: Sequence[str]) -> list[Any]:
        """Return {"vector": the text's vector} of each text."""
        return [{"vector": vector} for vector in self.embed(model, tokenizer, texts).tolist()]

    def show_response(self, response: Any) -> str:
        """Return the number of dimensions and the first elements."""
        vector = response["vector"]
        norm = sum(value * value for value in vector) ** 0.5
        return f"{len(vector)} dimensions, length {norm:.4f}: {', '.join(f'{value:.4f}' for value in vector[:6])}, …"

    def model_files(self, model: nn.Module, max_length: int | None) -> dict[str, bytes]:
        """Return the files with which sentence-transformers computes the same vectors."""
        return settings_files(self.options, model.config.get_text_config().hidden_size, max_length)


def contrastive_loss(vectors: Tensor, roles: Tensor, texts: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Return the weighted mean over anchors of the cross-entropy of an anchor's positive among the documents.

    No shape depends on values, so that it also runs in planning.

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


def _retrieval(vectors: Tensor, roles: list[int], texts: list[int]) -> dict[str, float]:
    """Return the metrics of distinct anchors against distinct documents."""
    queries: dict[int, int] = {}
    documents: dict[int, int] = {}
    relevant: dict[int, set[int]] = {}
    anchor = 0
    for index, (role, text) in enumerate(zip(roles, texts, strict=True)):
        if role == ANCHOR:
            anchor = text
            queries.setdefault(text, index)
            continue
        documents.setdefault(text, index)
        if role == POSITIVE:
            relevant.setdefault(anchor, set()).add(text)
    place = {text: number for number, text in enumerate(documents)}
    own = [sorted(place[text] for text in relevant[query]) for query in queries]
    return retrieval_metrics(vectors[list(queries.values())], vectors[list(documents.values())], own)


def _texts(item: Texts) -> Iterable[str]:
    return (item.anchor, item.positive, *item.negatives)


def _example(ids: Sequence[int], role: int, weight: float) -> Example:
    tokens = np.asarray(ids, dtype=np.int32)
    number = int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little", signed=True)
    example = as_probe(tokens, role)
    weights = np.full(1, weight, dtype=np.float32)
    return replace(example, weights=weights, group=0, columns={TEXT: Column(np.array(number, dtype=np.int64))})
