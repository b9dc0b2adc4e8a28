"""Rows of well-known datasets are read correctly, or refused with a remedy; nothing is guessed."""

from __future__ import annotations

from typing import Any

import pytest

from budwood.data.build import build_examples
from budwood.data.recognition import check_rows
from budwood.data.use import check_use
from budwood.errors import InputError
from budwood.model.text_tasks import CausalLM

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LM, CLASSIFY = "causal-lm", "sequence-classification"
TALK = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Hello", "weight": 1.0}]
RENDERED = "Below is an instruction.\n\n### Instruction:\nAdd\n\n### Input:\n2 2\n\n### Response:\n4"
WORSE = [TALK[0], {"role": "assistant", "content": "No"}]
HH = "\n\nHuman: Hi there\n\nAssistant: I agree, {}"

READ = {
    "Alpaca": ({"instruction": "Add", "input": "2 2", "output": "4", "text": RENDERED}, "alpaca", "text", "4"),
    "Alpaca with its prompt": (
        {"instruction": "Add", "input": "2 2", "output": "4", "prompt": RENDERED}, "alpaca", "prompt", "4",
    ),
    "Dolly": (
        {"instruction": "Who won?", "context": "A beat B.", "response": "A", "category": "q"}, "dolly", "category", "A",
    ),
    "UltraChat": ({"prompt": "Hi  there", "prompt_id": "", "messages": TALK}, "messages", "prompt, prompt_id", "Hello"),
    "no_robots": (
        {"prompt": "Hi there", "prompt_id": "a1", "messages": TALK, "category": "Chat"},
        "messages", "prompt, prompt_id, category", "Hello",
    ),
    "OpenHermes": (
        {"conversations": SHAREGPT, "source": "x", "category": None, "system_prompt": None, "hash": "9", "views": 1.0},
        "sharegpt", "source, category, system_prompt, hash, views", "Hello",
    ),
    "Tulu": ({"messages": TALK, "id": "1", "source": "x"}, "messages", "id, source", "Hello"),
    "Capybara": (
        {"source": "x", "conversation": [{"input": "Hi there", "output": "Hello"}]}, "conversation", "source", "Hello",
    ),
    "CodeAlpaca": ({"prompt": "Add", "completion": "4"}, "prompt-completion", "", "4"),
    "rendered": ({"conversations": SHAREGPT, "text": "<u>Hi there<a>Hello"}, "sharegpt", "text", "Hello"),
    "NuminaMath": ({"problem": "2 2", "solution": "4", "messages": TALK}, "messages", "problem, solution", "Hello"),
    "HH-RLHF": ({"chosen": HH.format("Hello"), "rejected": HH.format("No")},
                "preference-shared-prompt", "", "I agree, Hello"),
    "UltraFeedback": ({"prompt": "Hi there", "prompt_id": "1", "chosen": TALK, "rejected": WORSE, "messages": TALK,
                       "score_chosen": 8.0, "score_rejected": 2.0},
                      "preference", "prompt_id, messages, score_chosen, score_rejected", "Hello"),
    "Capybara pairs": ({"source": "x", "chosen": TALK, "rejected": WORSE}, "preference-shared-prompt", "source",
                       "Hello"),
    "KTO mix": ({"prompt": TALK[:1], "completion": TALK[1:], "label": True}, "judged", "", "Hello"),
    "Wikipedia": ({"id": "1", "url": "u", "title": "T", "text": "Hello"}, "text", "id, url, title", "Hello"),
    "ag_news": ({"text": "Hello", "label": "World"}, "text-label", "", ""),
    "go_emotions": ({"text": "Hello", "label": 3, "label_text": "joy"}, "text-label", "label_text", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_read_as_what_it_is(name: str, write: Any, byte_level: Any) -> None:
    row, format_name, ignored, answer = READ[name]
    task = CLASSIFY if "label" in row and "text" in row else LM
    rows = [row, {**row, "label": "other"}] if task == CLASSIFY else [row]
    tokenizer = byte_level(True, CHATML)
    examples = build_examples(write(rows), tokenizer, task, 512)
    assert examples.format == format_name
    assert (f"columns ignored: {ignored}" in examples.notes) == bool(ignored)
    if task == LM:
        ends = ("<|im_end|>", "</s>")
        said = tokenizer.decode(examples[0].labels.tolist())
        assert said.removesuffix(ends[0]).removesuffix(ends[1]).strip() == answer


REFUSED = {
    "OpenAssistant": ({"message_id": "1", "parent_id": None, "text": "Hi", "role": "prompter"},
                      "text . role are one message a row: join the messages of each conversation"),
    "Orca pairs": ({"system": "", "question": "Hi", "chosen": "Hello", "rejected": "No"},
                   "column 'question' would be left out: rename it to 'prompt'"),
    "UltraFeedback of another answer": (
        {"prompt": "Hi there", "chosen": TALK, "rejected": WORSE, "messages": [TALK[0], {"role": "assistant",
                                                                                         "content": "Other"}]},
        "does not read column 'messages', which would be left out"),
    "GSM8K": ({"question": "2 2?", "answer": "4"},
              "Rename 'question' to 'instruction' and 'answer' to 'output', for a chat model; or 'question' to "
              "'prompt' and 'answer' to 'completion', for plain text"),
    "MetaMathQA": ({"type": "x", "query": "2 2?", "original_question": "2 2?", "response": "4"},
                   "Rename 'query' to 'instruction' and 'response' to 'output'"),
    "OpenOrca": ({"id": "1", "system_prompt": "Be kind", "question": "2 2?", "response": "4"},
                 "and 'response' to 'output', and 'system_prompt' to 'system', for a chat model"),
    "SQuAD": ({"id": "1", "title": "T", "context": "A", "question": "Who?", "answers": {"text": ["A"]}},
              "Rename 'question' to 'instruction', and write the text of 'answers' as 'response'"),
    "SST-2": ({"sentence": "Good", "label": 1, "idx": 0}, "Rename 'sentence' to 'text'"),
    "MNLI": ({"premise": "a", "hypothesis": "b", "label": 0, "idx": 0}, "join 'premise' and 'hypothesis' into 'text'"),
    "CoNLL 2003": ({"id": "0", "tokens": ["A"], "pos_tags": [1], "chunk_tags": [1], "ner_tags": [0]},
                   "a tag for each token: rename 'ner_tags' to 'tags', and set base.task: token-classification"),
    "LIMA": ({"conversations": ["Hi", "Hello"], "source": "x"},
             "message 1 is a text without a role: it must be an object with role and content"),
    "Glaive": ({"system": "SYSTEM: Help", "chat": "USER: Hi ASSISTANT: Hello"},
               "'chat' is one text: split it into a list 'messages'"),
    "xLAM": ({"id": 1, "query": "Time?", "tools": "[]", "answers": "[]"},
             "'answers' as the assistant's tool_calls in a list 'messages'; 'tools' is read"),
    "Magpie": ({"instruction": "Hi there", "response": "Hello", "conversations": SHAREGPT},
               "can be read as .*Keep the columns of only one of them"),
    "XSum": ({"document": "Long", "summary": "Short"}, "'document' to 'prompt' and 'summary' to 'completion'"),
    "IMDB": ({"text": "Good", "label": 1}, "data for sequence-classification.*or remove 'label'"),
    "an unread system prompt": ({"conversations": SHAREGPT, "system_prompt": "Be kind"},
                                "'system_prompt', which would be left out. Rename it to 'system', or remove it"),
    "a text with other content": ({"instruction": "Add", "output": "4", "text": "Something else"},
                                  "instruction . output does not read column 'text', which would be left out"),
    "a prompt with other content": ({"prompt": "Answer in French", "messages": TALK},
                                    "messages does not read column 'prompt', which would be left out"),
}  # fmt: skip


def test_prompts_whose_answers_have_another_name(write: Any) -> None:
    """HumanEval: prompts for an objective that samples answers, or to be trained on after a renaming."""
    path = write([{"task_id": "1", "prompt": "def f():", "canonical_solution": " pass", "test": "t"}])
    data_format = check_rows(path, LM)
    with pytest.raises(InputError, match="prompts without answers.*or 'canonical_solution' to 'completion', for plain"):
        check_use(path, data_format, [CausalLM()])


def test_only_columns_that_the_task_reads_are_suggested(write: Any) -> None:
    path = write([{"input": "a", "output": "b"}])
    with pytest.raises(InputError, match=r"Rename 'input' to 'prompt' and 'output' to 'completion'\. Accepted: prompt"):
        check_rows(path, "sequence-to-sequence")
    with pytest.raises(InputError) as caught:
        check_rows(path, CLASSIFY)
    assert "Rename" not in str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_remedy(name: str, write: Any) -> None:
    row, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as caught:
        check_rows(write([row]), LM)
    assert "Did you mean" not in str(caught.value)
