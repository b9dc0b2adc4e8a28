"""The task of tags: a class for each word, and the entities that the tags B- and I- mark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from budwood import (
    Dropped,
    Encoded,
    Encoder,
    EvalTotals,
    Example,
    InputError,
    Run,
    SequenceClassification,
    as_probe,
)
from budwood_text.formats import TAGGING, WORD, Tagged
from budwood_text.positions import OutputPerToken, refuse_empty

OUTSIDE = "O"
NO_TOKEN = "words without a token of their own, which have no loss"


class TokenClassification(OutputPerToken, SequenceClassification):
    """A class for each word, at its first token; the classes are learned from the training data, as of texts."""

    api = 2
    name = TAGGING
    auto_class = "AutoModelForTokenClassification"
    peft_task_type = "TOKEN_CLS"

    def planned_row(self, text: str, number: int) -> dict[str, Any]:
        """Return words with a tag each."""
        words = text.split()
        return {"tokens": words, "tags": ["OX"[number % 2]] * len(words)}

    def encode(self, items: Sequence[Any], where: Sequence[str], encoder: Encoder) -> list[Encoded | Dropped]:
        """See `Task.encode`."""
        results: list[Encoded | Dropped] = []
        for item, place, (ids, at) in zip(items, where, _first_tokens(encoder.tokenizer, items), strict=True):
            size = len(ids)
            if size > (encoder.max_length or size):
                short = encoder.cut(item.text, encoder.max_length or 0)  # with the special token at the end
                pairs = enumerate(zip(short, ids, strict=False))
                ids, kept = short, next((place for place, (one, other) in pairs if one != other), len(short))
            else:
                kept = size
            words = [(token, tag) for token, tag in zip(at, item.tags, strict=True) if token is not None]
            inside = [(token, encoder.classes.index(tag, place)) for token, tag in words if token < kept]
            if len(words) < len(at):
                encoder.remarks[NO_TOKEN] += len(at) - len(words)
            if not inside:
                results.append(Dropped("no word has a token within max_length"))
                continue
            positions, labels = np.array(inside, dtype=np.int64).T
            weights = np.full(len(inside), item.weight, dtype=np.float32)
            example = Example({"input_ids": np.asarray(ids, dtype=np.int32)}, positions, labels, weights)
            results.append(Encoded([example], size - len(ids)))
        return results

    def labelled(self, example: Example) -> np.ndarray:
        """Return the positions of the words' first tokens."""
        return example.label_positions

    def probe(self, example: Example, limit: int | None = None) -> Example:
        """See `Task.probe`: the first tokens, with a label at the last word among them."""
        ids = example.inputs["input_ids"][:limit]
        inside = example.label_positions[example.label_positions < len(ids)]
        probe = as_probe(ids)
        probe.label_positions = inside[-1:] if len(inside) else probe.label_positions
        return probe

    def metrics(self, run: Run, totals: EvalTotals) -> dict[str, float]:
        """Return precision, recall and F1 of entities, if tags begin with B- and I-; else the macro F1 of tags.

        An entity counts if its boundaries and its type are right, as in CoNLL's shared tasks.
        """
        examples = run.examples if run.examples is not None else run.eval_examples
        names = examples.labels
        types = sorted({name[2:] for name in names if _is_entity(name)})
        if not types or any(not _is_entity(name) and name != OUTSIDE for name in names):
            return super().metrics(run, totals)
        from nervaluate.evaluator import Evaluator

        rows = iter(totals.pairs)
        pairs = [[next(rows) for _ in range(size)] for size in totals.sizes]
        truth, predicted = ([[names[int(pair[side])] for pair in row] for row in pairs] for side in (0, 1))
        found = Evaluator(truth, predicted, tags=types, loader="list").evaluate()
        self.report = _report({name: found["entities"][name]["strict"] for name in types}, found["overall"]["strict"])
        overall = found["overall"]["strict"]
        scores = {"precision": overall.precision, "recall": overall.recall, "f1": overall.f1}
        return {f"eval_entity_{name}": float(value) for name, value in scores.items()}

    def respond(self, model: nn.Module, tokenizer: Any, texts: Sequence[str], labels: Sequence[str]) -> list[Any]:
        """Return the words, tags and entities of each text; an entity has start, end, label and text."""
        refuse_empty(texts)
        device = next(model.parameters()).device
        answers = []
        for text in texts:
            words = tuple(match.span() for match in WORD.finditer(text)) or ((0, len(text)),)
            [(ids, at)] = _first_tokens(tokenizer, [Tagged(text, words, ())])
            placed = [(word, token) for word, token in zip(words, at, strict=True) if token is not None]
            limit = min(len(ids), tokenizer.model_max_length)
            placed = [(word, token) for word, token in placed if token < limit]
            if not placed:
                raise InputError(f"the text {text[:32]!r} has no word that the tokenizer knows.")
            example = as_probe(ids[:limit])
            example.label_positions = np.array([token for _, token in placed])
            example.labels, example.weights = np.zeros(len(placed), np.int64), np.ones(len(placed), np.float32)
            batch = self.collate([example], model, tokenizer, False).to(device)
            tags = [labels[index] for index in self.own_logits(model, batch).argmax(-1).tolist()]
            spans = [word for word, _ in placed]
            answers.append(
                {
                    "entities": _entities(text, spans, tags),
                    "tokens": [text[start:end] for start, end in spans],
                    "tags": tags,
                }
            )
        return answers

    def show_response(self, response: Any) -> str:
        """Return the entities, or every word with its tag."""
        if any(not _is_entity(tag) and tag != OUTSIDE for tag in response["tags"]):
            return " ".join(f"{word}/{tag}" for word, tag in zip(response["tokens"], response["tags"], strict=True))
        return ", ".join(f"{entity['text']} ({entity['label']})" for entity in response["entities"]) or "no entity"

    def predict(self, logits: Tensor) -> Tensor:
        """Return the most probable class of each row of logits [n, classes]."""
        return logits.argmax(-1)


def _first_tokens(tokenizer: Any, items: Sequence[Tagged]) -> list[tuple[list[int], list[int | None]]]:
    """Return the tokens of each text, and each word's first token; None if it has none, or shares it with another word.

    Raises:
        InputError: the tokenizer cannot say which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise InputError(
            "the base's tokenizer does not say where its tokens are in a text: take a base with tokenizer.json."
        )
    encoded = tokenizer([item.text for item in items], return_offsets_mapping=True, truncation=False)
    results = []
    for item, ids, offsets in zip(items, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        first: list[int | None] = []
        token = 0
        for start, end in item.words:
            while token < len(ids) and offsets[token][1] <= start:
                token += 1
            inside = token < len(ids) and offsets[token][0] < end
            taken = bool(first) and first[-1] == token
            first.append(token if inside and not taken else None)
        results.append((ids, first))
    return results


def _is_entity(tag: str) -> bool:
    return tag[:2] in ("B-", "I-") and len(tag) > 2


def _entities(text: str, words: Sequence[tuple[int, int]], tags: Sequence[str]) -> list[dict[str, Any]]:
    """Return the entities of tags; I- after another type, or at the start, begins one, as in CoNLL's evaluation."""
    entities: list[dict[str, Any]] = []
    before = OUTSIDE
    for (start, end), tag in zip(words, tags, strict=True):
        if _is_entity(tag):
            goes_on = tag[0] == "I" and _is_entity(before) and before[2:] == tag[2:]
            if goes_on:
                entities[-1]["end"] = end
            else:
                entities.append({"start": start, "end": end, "label": tag[2:]})
        before = tag
    return [{**entity, "text": text[entity["start"] : entity["end"]]} for entity in entities]


def _report(by_type: dict[str, Any], overall: Any) -> str:
    """Return a table of precision, recall, F1 and number of entities, of each type and of all."""
    width = max(map(len, (*by_type, "all")))
    lines = [f"{'':{width}}  precision    recall        f1   support"]
    for name, scores in (*by_type.items(), ("all", overall)):
        values = "".join(f"{value:10.4f}" for value in (scores.precision, scores.recall, scores.f1))
        lines.append(f"{name:{width}} {values}{scores.possible:10d}")
    return "\n".join(lines)
