"""The text tasks of core: next-token prediction and sequence classification."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from budwood.contract.examples import DESIRABLE, Batch, Column, Example
from budwood.contract.strategy import hookimpl
from budwood.contract.types import Outputs, Plan, Run
from budwood.data.chunk import BEYOND, TOO_LONG, Encoded
from budwood.data.encoder import Encoder
from budwood.data.formats import Dropped
from budwood.data.packing import collate_tokens
from budwood.data.preference import Judged, Pair
from budwood.data.prompts import Prompt
from budwood.data.text import Tokens, tokenise
from budwood.errors import InputError
from budwood.model.classification import Classification
from budwood.model.encoders import encoder_inputs, padded_rows, takes_segments, width_multiple
from budwood.model.evaluation import EvalTotals, at_least_fp32
from budwood.model.exact_match import exact_match
from budwood.model.heads import body_of, own_head, pooled_logits
from budwood.model.limits import positions_of
from budwood.model.ops.cross_entropy import cross_entropy
from budwood.model.task import Task


class TextTask(Task):
    """Base class of tasks on token ids: packing, special tokens, truncated probes."""

    def length(self, example: Example) -> int:
        """Return the number of tokens."""
        return len(example.inputs["input_ids"])

    def collate(self, examples: Sequence[Example], model: nn.Module, tokenizer: Any, packed: bool) -> Batch:
        """Pack the examples into one row, or pad each to a row."""
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
        return collate_tokens(examples, packed, pad, self.pools_examples(model), width_multiple(model))

    def body_inputs(self, body: nn.Module, batch: Batch, causal: bool) -> dict[str, Any]:
        """Return the arguments of the forward of a model's body: with the boundaries of packed examples.

        Args:
            causal: whether a token sees only those before it.
        """
        if causal:
            return _inputs(batch)
        if batch.segments:
            return encoder_inputs(body, batch)
        return {name: tensor for name, tensor in batch.inputs.items() if name != "position_ids"}

    def read_texts(self, model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text as the model reads it, truncated to the length that it was made for."""
        encoder = Encoder(tokenizer)
        limit = min(tokenizer.model_max_length, positions_of(model) or sys.maxsize)
        rows = zip(texts, encoder.whole(texts), strict=True)
        return [ids if len(ids) <= limit else encoder.cut(text, limit) for text, ids in rows]

    def check_inputs(self, model: nn.Module, example: Example) -> str:
        """See `Task.check_inputs`."""
        ids, known = example.inputs.get("input_ids"), model.get_input_embeddings().num_embeddings  # type: ignore
        if ids is None or not len(ids) or ids.min() < 0 or ids.max() >= known:
            return "a prompt contains a token that is not in the base's vocabulary"
        return ""

    def loss_is_log_prob(self) -> bool:
        """Return True: the cross-entropy of a token or class is the negative of its log-probability."""
        return True

    def log_probs(self, logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        """See `Task.log_probs`."""
        return -cross_entropy(logits if temperature == 1 else at_least_fp32(logits) / temperature, labels)

    def special_positions(self, run: Run, batch: Batch) -> Tensor:
        """See `Task.special_positions`."""
        ids = batch.inputs["input_ids"].flatten()
        return torch.isin(ids, torch.tensor(run.tokenizer.all_special_ids, device=ids.device))

    def show(self, example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
        """Return runs of tokens with and without a loss, with special tokens spelled out."""
        ids = example.inputs["input_ids"]
        scored = np.zeros(len(ids) + 1, dtype=bool)
        scored[self.labelled(example)] = True
        edges = np.flatnonzero(np.diff(scored[: len(ids)])) + 1
        bounds = [0, *edges.tolist(), len(ids)]
        pieces, shown = [], ""
        for start, stop in zip(bounds, bounds[1:], strict=False):
            # Decode from the beginning, since some tokenizers drop a space at the start of the decoded text.
            whole = tokenizer.decode(ids[:stop].tolist(), skip_special_tokens=False)
            alone = tokenizer.decode(ids[start:stop].tolist(), skip_special_tokens=False)
            pieces.append((whole[len(shown) :] if whole.startswith(shown) else alone, bool(scored[start])))
            shown = whole
        return pieces

    def labelled(self, example: Example) -> np.ndarray:
        """Return the positions of tokens that are labels."""
        return np.zeros(0, dtype=np.int64)

    def altered(self, model: nn.Module, example: Example) -> Example:
        """Return the example with every token replaced by the next in the vocabulary."""
        vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        ids = (example.inputs["input_ids"] + 1) % vocabulary
        return replace(example, inputs={**example.inputs, "input_ids": ids})


class CausalLM(TextTask):
    """Next-token prediction, with a loss on completions."""

    api = 2
    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    peft_task_type = "CAUSAL_LM"

    def planned_row(self, text: str, number: int) -> dict[str, Any]:
        """Return plain text, all of which has a loss."""
        return {"text": text}

    def encode(self, items: Sequence[Any], where: Sequence[str], encoder: Encoder) -> list[Encoded | Dropped]:
        """See `Task.encode`. A pair becomes a group of two examples, the chosen answer first."""
        answers = [_answers_of(item) for item in items]
        places = [place for place, several in zip(where, answers, strict=True) for _ in several]
        tokenised = iter(tokenise([answer for several in answers for answer in several], places, encoder))
        results: list[Encoded | Dropped] = []
        for item, place, several in zip(items, where, answers, strict=True):
            rows = [next(tokenised) for _ in several]
            if isinstance(item, Pair | Judged):
                results.append(_encode_answers(item, place, rows, encoder))
            elif isinstance(item, Prompt):
                results.append(_encode_prompt(rows[0][0].ids, encoder))
            else:
                results.append(_encode_rows(rows[0], encoder))
        return results

    def pools_examples(self, model: nn.Module) -> bool:
        """Return False: a decoder has an output for each token."""
        return False

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run the model below its head; the head is the model's own forward on rows of that output."""
        return Outputs(_hidden(body_of(model), batch), lambda rows: own_head(model, rows))

    def own_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Task.own_logits`."""
        inputs = {name: t for name, t in batch.inputs.items() if name not in ("position_ids", "attention_mask")}
        logits: Tensor = model(**inputs, use_cache=False).logits[0]
        return logits[batch.label_positions]

    def labelled_positions(self, batch: Batch) -> Tensor:
        """Return the mask of labels as inputs: each is the token after the position that predicts it."""
        mask = torch.zeros(batch.rows * batch.width, dtype=torch.bool, device=batch.label_positions.device)
        return mask.index_fill_(0, batch.label_positions + 1, True)

    def labelled(self, example: Example) -> np.ndarray:
        """Return the positions after those that predict a label."""
        return example.label_positions + 1

    def prompt(self, example: Example) -> np.ndarray:
        """Return the tokens from which generation starts: those before the first label, or half of plain text."""
        ids, first = example.inputs["input_ids"], example.label_positions[:1]
        size = int(first[0]) + 1 if len(first) and first[0] else (len(ids) + 1) // 2 if len(first) else len(ids)
        return ids[:size]

    def probe(self, example: Example, limit: int | None = None) -> Example:
        """See `Task.probe`."""
        inputs = self.prompt(example)[-limit if limit else None :]
        probe = as_probe(inputs, int(example.labels[0]) if len(example.labels) else 0)
        return replace(probe, inputs={**example.inputs, **probe.inputs}, key=example.key, row=example.row)

    def label_metrics(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return whether the most probable token is the label."""
        return {"token_accuracy": (logits.argmax(-1) == labels).float()}

    def metrics(self, run: Run, totals: EvalTotals) -> dict[str, float]:
        """Return the perplexity and, for prompts with short completions, the exact match of generated text."""
        metrics = {"eval_perplexity": math.exp(min(totals.means["loss"], 700.0))}
        match = exact_match(run, self)
        return metrics if match is None else {**metrics, "eval_exact_match": match}


def _encode_prompt(ids: Sequence[int], encoder: Encoder) -> Encoded | Dropped:
    """Return an example without labels, since a strategy generates the answer."""
    if len(ids) > (encoder.max_length or len(ids)):
        return Dropped(TOO_LONG)
    tokens, none = np.asarray(ids, dtype=np.int32), np.zeros(0, dtype=np.int64)
    return Encoded([Example({"input_ids": tokens}, none, none.astype(np.int32), none.astype(np.float32))])


def _answers_of(item: Any) -> list[Any]:
    """Return the items to tokenise: both answers of a pair, the chosen one first."""
    if isinstance(item, Pair):
        return [item.chosen, item.rejected]
    return [item.answer] if isinstance(item, Judged) else [item]


def _encode_rows(rows: Sequence[Tokens], encoder: Encoder) -> Encoded | Dropped:
    """Encode an item's token rows, truncated to `encoder.max_length`."""
    examples, beyond, cut = [], 0, 0
    for tokens in rows:
        example = _example(tokens, encoder.max_length)
        if example is not None:
            examples.append(example)
            cut += len(tokens.ids) - len(example.inputs["input_ids"])
        else:
            beyond += any(stop > max(start, 1) for start, stop in tokens.spans)
    if not examples:
        return Dropped(BEYOND if beyond else "no token with a loss")
    if beyond:
        encoder.remarks["answers of split conversations dropped, which begin beyond max_length"] += beyond
    return Encoded(examples, cut)


def _encode_answers(
    item: Pair | Judged, where: str, rows: Sequence[Sequence[Tokens]], encoder: Encoder
) -> Encoded | Dropped:
    """Encode the answers of an objective, which are never truncated; column `desirable` is 1 for those to imitate.

    Raises:
        InputError: the chat template makes several examples of an answer, or the same of both; `data.loss_on` is "all".
    """
    if encoder.loss_on == "all":
        raise InputError(f"{where}: data.loss_on: all: answers are compared without their prompts. Remove it.")
    if not all(rows):
        return Dropped("no token with a loss")
    if any(len(tokens) > 1 for tokens in rows):
        raise InputError(
            f"{where}: the chat template rewrites the earlier turns of an answer, so it is several examples: give an "
            "answer of one message."
        )
    if any(len(tokens.ids) > (encoder.max_length or len(tokens.ids)) for (tokens,) in rows):
        return Dropped(TOO_LONG)
    examples = [_example(tokens, None) for (tokens,) in rows]
    if None in examples:
        return Dropped("no token with a loss")
    if isinstance(item, Pair) and list(rows[0][0].ids) == list(rows[1][0].ids):
        raise InputError(f"{where}: both answers are the same tokens, so neither is preferred. Remove the row.")
    desirable, group = ([item.desirable], None) if isinstance(item, Judged) else ([True, False], 0)
    return Encoded([
        replace(example, group=group, columns={DESIRABLE: Column(np.array(value, dtype=np.float32))})
        for example, value in zip(examples, desirable, strict=True) if example is not None
    ])  # fmt: skip


def _example(tokens: Tokens, max_length: int | None) -> Example | None:
    """Return an example of the first `max_length` tokens; None if none of them has a loss."""
    ids = np.asarray(tokens.ids[:max_length], dtype=np.int32)
    weights = np.zeros(len(ids), dtype=np.float32)
    for (start, stop), weight in zip(tokens.spans, tokens.weights, strict=True):
        weights[start:stop] = weight
    weights[:1] = 0  # no position precedes the first token to predict it
    at = np.flatnonzero(weights)
    return Example({"input_ids": ids}, at - 1, ids[at], weights[at]) if len(at) else None


class SequenceClassification(Classification, TextTask):
    """Classification of texts; the classes are learned from the training data and stored in the adapter."""

    api = 2
    name = "sequence-classification"
    auto_class = "AutoModelForSequenceClassification"
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"

    def planned_row(self, text: str, number: int) -> dict[str, Any]:
        """Return a text of one of two classes."""
        return {"text": text, "label": "ab"[number % 2]}

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        """Refuse an encoder-decoder, whose classifier looks for the end of a text that the decoder reads."""
        if plan.model is None or self.auto_class != SequenceClassification.auto_class:
            return
        if getattr(plan.model.config, "is_encoder_decoder", False):
            what = f"'{plan.model.config.model_type}' is an encoder-decoder"
            plan.problem(self, f"{what}, which has no classifier for one text: take an encoder or a decoder")

    def encode(self, items: Sequence[Any], where: Sequence[str], encoder: Encoder) -> list[Encoded | Dropped]:
        """See `Task.encode`."""
        results: list[Encoded | Dropped] = []
        for item, place, ids in zip(items, where, encoder.whole([item.text for item in items]), strict=True):
            cut = max(len(ids) - (encoder.max_length or len(ids)), 0)
            if cut:
                ids = encoder.cut(item.text, encoder.max_length or 0)
            tokens, label = np.asarray(ids, dtype=np.int32), encoder.classes.index(item.label, place)
            weights = np.full(1, item.weight, dtype=np.float32)
            example = Example({"input_ids": tokens}, np.array([len(tokens) - 1]), np.array([label]), weights)
            results.append(Encoded([example], cut))
        return results

    def pools_examples(self, model: nn.Module) -> bool:
        """Return False for a decoder, whose head reads each example's last token; other models pool each example."""
        return not hasattr(model, "score")

    def packs_rows(self, model: nn.Module) -> bool:
        """Return whether the model's body takes positions and segments."""
        return not self.pools_examples(model) or takes_segments(_body(model))

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run the decoder and return its head; if the model pools each example, return its logits."""
        if not self.pools_examples(model):
            return Outputs(_hidden(_body(model), batch), model.score)  # type: ignore[arg-type]
        if batch.segments:
            body = _body(model)
            hidden, inputs = padded_rows(body(**encoder_inputs(body, batch)).last_hidden_state[0], batch)
            return Outputs(pooled_logits(model, body, hidden, inputs)[None], lambda rows: rows)
        inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "position_ids"}
        return Outputs(model(**inputs).logits[:, None], lambda rows: rows)

    def own_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Task.own_logits`."""
        extra = {} if self.pools_examples(model) else {"use_cache": False}
        logits: Tensor = model(input_ids=batch.inputs["input_ids"], **extra).logits
        return logits

    def probe(self, example: Example, limit: int | None = None) -> Example:
        """See `Task.probe`."""
        return as_probe(example.inputs["input_ids"][-limit if limit else None :], int(example.labels[0]))

    def respond(self, model: nn.Module, tokenizer: Any, texts: Sequence[str], labels: Sequence[str]) -> list[Any]:
        """Return {"label": the most probable class, "probabilities": of all classes} of each text."""
        return [self.answer(logits, labels) for logits in self.text_logits(model, tokenizer, texts)]

    def text_logits(self, model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> list[Tensor]:
        """Return the logits of each text, [classes] fp32 on the CPU."""
        device = next(model.parameters()).device
        probes = map(as_probe, self.read_texts(model, tokenizer, texts))
        batches = (self.collate([probe], model, tokenizer, False).to(device) for probe in probes)
        return [self.own_logits(model, batch)[0].float().cpu() for batch in batches]


def as_probe(ids: Sequence[int] | np.ndarray, label: int = 0) -> Example:
    """Return an example of token ids with one label at its last position."""
    tokens = np.asarray(ids, dtype=np.int32)
    return Example({"input_ids": tokens}, np.array([len(tokens) - 1]), np.array([label]), np.ones(1, dtype=np.float32))


def _inputs(batch: Batch) -> dict[str, Any]:
    inputs: dict[str, Any] = {**batch.inputs, "use_cache": False}
    if not batch.segments:
        return inputs
    from budwood.model.ops.attention import packed_mask  # takes seconds, for nothing if no model runs

    return {**inputs, "attention_mask": packed_mask(batch.label_positions.device), "segments": batch.segments}


def _hidden(body: nn.Module, batch: Batch) -> Tensor:
    """Return the output of a body, of which the head reads the label positions alone."""
    from budwood.model.halves.labels import hidden_states  # takes seconds, as above

    return hidden_states(body, _inputs(batch), batch.label_positions, (batch.rows, batch.width))


def _body(model: nn.Module) -> nn.Module:
    prefix: Any = model.base_model_prefix
    return model.get_submodule(prefix)
