"""The task of masked tokens (Devlin et al., 2019, section 3.1), on whole words or single tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from budwood import (
    Batch,
    Column,
    Dropped,
    Encoded,
    Encoder,
    EvalTotals,
    Example,
    Generator,
    InputError,
    Options,
    Run,
    as_probe,
    load_tokenizer,
)
from budwood_text.positions import OutputPerToken, refuse_empty

WORD = "word"
"""Column with the number of the word that each token belongs to; -1 for special tokens."""
CANDIDATES = 5
"""Number of fillings of a mask that are reported."""


class MaskedLMOptions(Options):
    """Options of `masked-lm`."""

    share: float = Field(0.15, gt=0, lt=1, description="share of an example's words (or tokens) that are predicted")
    whole_words: bool = Field(True, description="choose whole words, all of whose tokens are predicted; else tokens")
    masked: float = Field(0.8, ge=0, le=1, description="share of the chosen tokens that are replaced by the mask token")
    random: float = Field(0.1, ge=0, le=1, description="share of them that are replaced by a random token")


class MaskedLM(OutputPerToken):
    """Predicts masked tokens of plain text, by an encoder; the masks are new in each epoch, and fixed in evaluation."""

    api = 2
    name = "masked-lm"
    auto_class = "AutoModelForMaskedLM"
    Options = MaskedLMOptions
    training_options = ("share", "whole_words", "masked", "random")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        if self.options.masked + self.options.random > 1:
            raise InputError("masked-lm: masked and random are shares of the chosen tokens: they exceed 1 together.")
        self.mask: int = -1
        self.tokens: np.ndarray = np.zeros(0, dtype=np.int64)
        """Ids of the tokens that may replace others: all but the special ones."""

    def read_base(self, folder: Path) -> None:
        """Read the mask token and the vocabulary.

        Raises:
            InputError: the base's tokenizer has no mask token.
        """
        tokenizer = load_tokenizer(folder)
        if tokenizer.mask_token_id is None:
            raise InputError(
                f"base '{folder}' has no mask token, so masked-lm cannot train it: take an encoder such as BERT, or "
                "set base.task: causal-lm."
            )
        if not tokenizer.is_fast:
            raise InputError(f"base '{folder}': masked-lm needs a tokenizer.json, which says where words begin.")
        self.mask = tokenizer.mask_token_id
        self.tokens = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)

    def planned_row(self, text: str, number: int) -> dict[str, Any]:
        """Return a text."""
        return {"text": text}

    def encode(self, items: Sequence[Any], where: Sequence[str], encoder: Encoder) -> list[Encoded | Dropped]:
        """See `Task.encode`. Every token but special ones is a label, of which `vary` chooses some."""
        results: list[Encoded | Dropped] = []
        encoded = encoder.tokenizer([item.text for item in items], return_special_tokens_mask=True, truncation=False)
        for index, (item, ids) in enumerate(zip(items, encoded["input_ids"], strict=True)):
            cut = max(len(ids) - (encoder.max_length or len(ids)), 0)
            if cut:
                ids = encoder.cut(item.text, encoder.max_length or 0)
            special = np.isin(ids, encoder.tokenizer.all_special_ids)
            at = np.flatnonzero(~special)
            if not len(at):
                results.append(Dropped("no token to mask"))
                continue
            words = [-1 if word is None else word for word in encoded.word_ids(index)[: len(ids)]]
            words = np.where(special, -1, np.resize(words, len(ids)))
            tokens = np.asarray(ids, dtype=np.int32)
            weights = np.full(len(at), item.weight, dtype=np.float32)
            columns = {WORD: Column(words.astype(np.int32), axis="input")}
            results.append(Encoded([Example({"input_ids": tokens}, at, tokens[at], weights, columns=columns)], cut))
        return results

    def vary(self, example: Example, generator: Generator) -> Example:
        """Choose and mask tokens: at least one word, and as close to `share` of the words as whole ones allow."""
        draw = np.random.default_rng(generator.torch_generator.initial_seed())
        at = example.label_positions
        words = example.columns[WORD].values[at] if self.options.whole_words else np.arange(len(at))
        units = np.unique(words)
        count = min(max(round(self.options.share * len(units)), 1), len(units))
        chosen = draw.permutation(units)[:count]
        kept = np.isin(words, chosen)
        places = at[kept]
        ids = example.inputs["input_ids"].copy()
        draws = draw.random(len(places))
        others = draw.choice(self.tokens, len(places))
        masked, replaced = self.options.masked, self.options.masked + self.options.random
        ids[places] = np.where(draws < masked, self.mask, np.where(draws < replaced, others, ids[places]))
        return replace(
            example, inputs={**example.inputs, "input_ids": ids}, label_positions=places, labels=example.labels[kept],
            weights=example.weights[kept],
        )  # fmt: skip

    def probe(self, example: Example, limit: int | None = None) -> Example:
        """See `Task.probe`: one token in the middle is masked."""
        ids = example.inputs["input_ids"][:limit].copy()
        inside = example.label_positions[example.label_positions < len(ids)]
        place = int(inside[len(inside) // 2]) if len(inside) else len(ids) - 1
        label, ids[place] = int(ids[place]), self.mask
        probe = as_probe(ids, label)
        probe.label_positions = np.array([place])
        return probe

    def labelled(self, example: Example) -> np.ndarray:
        """Return the positions of labels."""
        return example.label_positions

    def labelled_positions(self, batch: Batch) -> Tensor:
        """Return the mask of the positions that are predicted."""
        mask = torch.zeros(batch.rows * batch.width, dtype=torch.bool, device=batch.label_positions.device)
        return mask.index_fill_(0, batch.label_positions, True)

    def show(self, example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
        """Return the example as masked in the first epoch of a run with seed 0; labels show what is read and meant."""
        varied = self.vary(example, Generator(0, 0, example.key))
        labels = dict(zip(varied.label_positions.tolist(), varied.labels.tolist(), strict=True))
        pieces: list[tuple[str, bool]] = []
        start = 0
        ids = varied.inputs["input_ids"].tolist()
        for place in [*labels, len(ids)]:
            if place > start:
                pieces.append((tokenizer.decode(ids[start:place]), False))
            if place < len(ids):
                pieces.append((f" {tokenizer.decode([ids[place]])}={tokenizer.decode([labels[place]])} ", True))
            start = place + 1
        return pieces

    def metrics(self, run: Run, totals: EvalTotals) -> dict[str, float]:
        """Return the perplexity of the masked tokens."""
        return {"eval_perplexity": math.exp(min(totals.means["loss"], 700.0))}

    def respond(self, model: nn.Module, tokenizer: Any, texts: Sequence[str], labels: Sequence[str]) -> list[Any]:
        """Return each text with its masks filled, and the most probable tokens of each mask.

        Raises:
            InputError: a text has no mask.
        """
        refuse_empty(texts)
        device = next(model.parameters()).device
        answers = []
        for ids in self.read_texts(model, tokenizer, texts):
            tokens = np.array(ids)
            at = np.flatnonzero(tokens == self.mask)
            if not len(at):
                raise InputError(f"a text has no mask to fill: write {tokenizer.mask_token} where a word is missing.")
            example = replace(
                as_probe(ids),
                label_positions=at,
                labels=np.zeros(len(at), np.int64),
                weights=np.ones(len(at), np.float32),
            )
            batch = self.collate([example], model, tokenizer, False).to(device)
            best = self.own_logits(model, batch).float().softmax(-1).topk(CANDIDATES)
            filled = [
                [
                    {"token": tokenizer.decode([token]).strip(), "probability": chance}
                    for token, chance in zip(*row, strict=True)
                ]
                for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            tokens[at] = best.indices[:, 0].cpu().numpy()
            answers.append({"text": tokenizer.decode(tokens.tolist(), skip_special_tokens=True), "masks": filled})
        return answers

    def show_response(self, response: Any) -> str:
        """Return the filled text, and the fillings of each mask with their probabilities."""
        rows = (", ".join(f"{each['token']} {each['probability']:.1%}" for each in mask) for mask in response["masks"])
        return f"{response['text']}   ({'; '.join(rows)})"
