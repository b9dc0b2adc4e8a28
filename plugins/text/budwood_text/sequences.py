"""The task of sequences from sequences, by encoder-decoders such as T5 and BART."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from budwood import (
    Batch,
    Dropped,
    Encoded,
    Encoder,
    EvalTotals,
    Example,
    InputError,
    Outputs,
    Plan,
    Run,
    TextTask,
    as_probe,
    autocast,
    collate_tokens,
    hookimpl,
)
from budwood_text.positions import refuse_empty

ANSWER = 128
"""Largest number of tokens of an answer."""
SHORT = 64
"""Exact match is measured if completions have at most so many tokens on average."""


class SequenceToSequence(TextTask):
    """Writes a completion from a prompt: the encoder reads the prompt, and the decoder learns the completion."""

    api = 2
    name = "sequence-to-sequence"
    auto_class = "AutoModelForSeq2SeqLM"
    peft_task_type = "SEQ_2_SEQ_LM"

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        """Refuse a base without a start token, and strategies that need one sequence of embeddings or a decoder."""
        if plan.model is not None and getattr(plan.model.config, "decoder_start_token_id", None) is None:
            plan.problem(self, "the base's config.json has no decoder_start_token_id")
        for strategy in plan.strategies:
            if strategy.name == "adversarial":
                plan.problem(strategy, f"{self} has two sequences of embeddings, so noise is not defined: remove it")
            if hasattr(type(strategy), "next_examples"):
                plan.problem(strategy, f"{self} does not sample during training: remove it")

    def planned_row(self, text: str, number: int) -> dict[str, Any]:
        """Return a prompt and a completion of the same length."""
        return {"prompt": text, "completion": text}

    def encode(self, items: Sequence[Any], where: Sequence[str], encoder: Encoder) -> list[Encoded | Dropped]:
        """See `Task.encode`. Prompt and completion are each cut to `max_length`."""
        for item, place in zip(items, where, strict=True):
            if not isinstance(getattr(item, "prompt", None), str):
                raise InputError(f"{place}: messages need a chat model, but {self.name} reads texts: give texts.")
        limit = encoder.max_length
        sources, targets = (encoder.whole([getattr(item, side) for item in items]) for side in ("prompt", "completion"))
        results: list[Encoded | Dropped] = []
        for item, place, source, target in zip(items, where, sources, targets, strict=True):
            end = encoder.end(place)
            target = target if target[-1:] == [end] else [*target, end]
            cut = sum(max(len(ids) - (limit or len(ids)), 0) for ids in (source, target))
            source = source if len(source) <= (limit or len(source)) else encoder.cut(item.prompt, limit or 0)
            labels = np.asarray(target[:limit], dtype=np.int32)
            weights = np.full(len(labels), item.weight, dtype=np.float32)
            inputs = {"input_ids": np.asarray(source, dtype=np.int32)}
            results.append(Encoded([Example(inputs, np.arange(len(labels)), labels, weights)], cut))
        return results

    def length(self, example: Example) -> int:
        """Return the number of tokens of prompt and completion."""
        return len(example.inputs["input_ids"]) + len(example.label_positions)

    def pools_examples(self, model: nn.Module) -> bool:
        """Return False: the decoder has an output for each token of the completion."""
        return False

    def packs_rows(self, model: nn.Module) -> bool:
        """Return False: the attention between decoder and encoder knows no boundaries."""
        return False

    def collate(self, examples: Sequence[Example], model: nn.Module, tokenizer: Any, packed: bool) -> Batch:
        """Pad prompts and completions to a row each; the outputs are laid out like the completions."""
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
        config: Any = model.config
        starts = [np.array([config.decoder_start_token_id], dtype=np.int32)] * len(examples)
        shifted = [np.concatenate([start, e.labels[:-1]]) for start, e in zip(starts, examples, strict=True)]
        read = [replace(e, inputs={"input_ids": ids}) for e, ids in zip(examples, shifted, strict=True)]
        batch = collate_tokens(read, False, pad)
        none = np.zeros(0, dtype=np.int64)
        prompts = [Example({"input_ids": e.inputs["input_ids"]}, none, none, none.astype(np.float32)) for e in examples]
        source = collate_tokens(prompts, False, pad)
        inputs = {name: source.inputs[name] for name in ("input_ids", "attention_mask")}
        inputs["decoder_input_ids"] = batch.inputs["input_ids"]
        return replace(batch, inputs=inputs, lengths=tuple(self.length(e) for e in examples))

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run the complete model: `hidden` is its logits [rows, width, vocabulary]."""
        return Outputs(model(**batch.inputs, use_cache=False).logits, lambda rows: rows)

    def own_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Task.own_logits`."""
        ids = {name: batch.inputs[name] for name in ("input_ids", "decoder_input_ids")}
        logits: Tensor = model(**ids, use_cache=False).logits[0]
        return logits[batch.label_positions]

    def noise_module(self, model: nn.Module) -> NoReturn:
        """Refuse noise.

        Raises:
            InputError: always.
        """
        raise InputError(f"task '{self.name}' has two sequences of embeddings: noise cannot be added to it.")

    def probe(self, example: Example, limit: int | None = None) -> Example:
        """See `Task.probe`: the prompt, with a label at the first token of the completion."""
        probe = as_probe(example.inputs["input_ids"][:limit], int(example.labels[0]))
        probe.label_positions = np.zeros(1, dtype=np.int64)
        return probe

    def show(self, example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
        """Return prompt and completion."""
        prompt, answer = (tokenizer.decode(ids.tolist()) for ids in (example.inputs["input_ids"], example.labels))
        return [(f"{prompt} → ", False), (answer, True)]

    def label_metrics(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return whether the most probable token is the label."""
        return {"token_accuracy": (logits.argmax(-1) == labels).float()}

    def metrics(self, run: Run, totals: EvalTotals) -> dict[str, float]:
        """Return the perplexity and, for short completions, the exact match of greedy answers."""
        metrics = {"eval_perplexity": math.exp(min(totals.means["loss"], 700.0))}
        examples, limit = run.eval_examples, run.recipe.train.eval_generate
        assert examples is not None
        chosen = np.unique(np.linspace(0, len(examples) - 1, min(limit, len(examples))).astype(int)) if limit else []
        rows = [examples[int(index)] for index in chosen]
        if not rows or np.mean([len(example.labels) for example in rows]) > SHORT:
            return metrics
        longest = max(len(example.labels) for example in rows) + 4
        prompts = [example.inputs["input_ids"].tolist() for example in rows]
        with autocast(run):  # as in training and in `respond`
            answers = _answer(run.model, run.tokenizer, prompts, longest)
        wanted = [run.tokenizer.decode(example.labels.tolist(), skip_special_tokens=True) for example in rows]
        right = [answer.strip() == text.strip() for answer, text in zip(answers, wanted, strict=True)]
        return {**metrics, "eval_exact_match": float(np.mean(right))}

    def respond(self, model: nn.Module, tokenizer: Any, texts: Sequence[str], labels: Sequence[str]) -> list[Any]:
        """Return {"text": the greedy answer, of at most 128 tokens} of each text."""
        refuse_empty(texts)
        answers = _answer(model, tokenizer, self.read_texts(model, tokenizer, texts), ANSWER)
        return [{"text": answer} for answer in answers]

    def show_response(self, response: Any) -> str:
        """Return the answer on one line."""
        return " ".join(response["text"].split()) or "(nothing)"


def _answer(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], longest: int) -> list[str]:
    """Return the greedy answer to each prompt, of at most `longest` tokens; one prompt at a time."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    texts = []
    try:
        for ids in prompts:
            row = torch.tensor([list(ids)], device=device)
            with torch.no_grad():
                out = model.generate(
                    input_ids=row,
                    attention_mask=torch.ones_like(row),
                    max_new_tokens=longest,
                    do_sample=False,
                    num_beams=1,
                )
            texts.append(str(tokenizer.decode(out[0].tolist(), skip_special_tokens=True)))
    finally:
        model.train(training)
    return texts
