"""The examples of docs/data.md: rows, and what training makes of them. `make_data_page.py` prints them, a test checks.

The text that has a loss is enclosed in ⟦ ⟧.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoTokenizer, ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from budwood.contract.loading import create
from budwood.data.build import build_examples
from budwood.data.files import find_files
from budwood.data.formats import CAUSAL_LM, CLASSIFICATION
from budwood.errors import InputError

BASE = Path(__file__).parents[1] / "examples" / "budwood_demo" / "base"
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content and (loop.last or enable_thinking) %}<think>
{{ m.reasoning_content }}
</think>
{% endif %}{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
DATED = "Today is {{ strftime_now('%d %b %Y') }}. " + TEMPLATE


@dataclass(frozen=True)
class Shown:
    """A file and its examples, or the message with which it is refused.

    Attributes:
        title: heading on the page; "" for one that belongs to the previous example.
        rows: the rows of a JSONL file, or the text of the file `name`.
        sees: the text of each example; for a refusal, the message, in which FILE stands for the file's name.
        says: parts of the line about the data, such as ignored columns.
        note: explanation on the page.
        options: options of `build_examples`, as in the recipe's `data` section.
    """

    title: str
    rows: Sequence[Mapping[str, Any]] | str
    sees: Sequence[str] | str
    says: Sequence[str] = ()
    note: str = ""
    task: str = CAUSAL_LM
    name: str = "train.jsonl"
    options: Mapping[str, Any] = field(default_factory=dict)
    template: str = TEMPLATE


@dataclass(frozen=True)
class Found:
    """The files of a folder and those that a source selects, or the message with which it is refused."""

    source: str
    files: Sequence[str]
    found: Sequence[str] | str
    split: str | None = None
    config: str | None = None


USER, CALL = "<|im_start|>user\n", "<|im_start|>assistant\n"
HELLO = f"{USER}Hi<|im_end|>\n{CALL}⟦Hello<|im_end|>⟧"
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
MORE = [*TALK, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bye"}]
TOOL = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
FUNCTION = '{"name": "time", "arguments": {}}'

FORMATS = [
    Shown(
        "Text",
        [{"text": "The sea is calm."}],
        ["<|bos|>⟦The sea is calm.<|eos|>⟧"],
        note="Every token except the first has a loss, including the end-of-sequence token.",
    ),
    Shown(
        "Prompt and completion",
        [{"prompt": "a fast web browser\nSection:", "completion": " web"}],
        ["<|bos|>a fast web browser\nSection:⟦ web<|eos|>⟧"],
        note="Nothing is inserted between the two; here the completion begins with the space. `weight` multiplies the "
        "loss.",
    ),
    Shown(
        "Prompts",
        [{"prompt": "a fast web browser\nSection:", "answer": "web"}],
        ["<|bos|>a fast web browser\nSection:"],
        says=["columns ignored: answer"],
        note="For objectives that generate the answers, such as `grpo`. A column that a reward reads is not ignored. "
        "The prompt may also be a list of messages, or be rendered with `as_chat`. One longer than `max_length` is "
        "dropped.",
    ),
    Shown(
        "Prompt and completion as messages",
        [{"prompt": MORE[:3], "completion": MORE[3:]}],
        [f"{USER}Hi<|im_end|>\n{CALL}Hello<|im_end|>\n{USER}And?<|im_end|>\n{CALL}⟦Bye<|im_end|>⟧"],
        note="Answers in the prompt have no loss. The completion may also be a text, the assistant's answer.",
    ),
    Shown(
        "Messages",
        [{"messages": MORE, "id": 7}],
        [f"{HELLO}\n{USER}And?<|im_end|>\n{CALL}⟦Bye<|im_end|>⟧"],
        says=["columns ignored: id"],
        note="Every answer has a loss, with its end token. The column may also be `conversation` or `conversations`.",
    ),
    Shown(
        "Text in parts",
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, TALK[1]]}],
        [HELLO],
        note="Parts are joined with line breaks. A part that is not text, such as an image, is refused.",
    ),
    Shown(
        "OpenAI's fine-tuning files, with tools and weights",
        [
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello", "weight": 0},
                    {"role": "user", "content": "Time?"},
                    {"role": "assistant", "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "time", "arguments": "{}"}},
                    ]},
                    {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
                    {"role": "assistant", "content": "Noon"},
                ],
                "tools": [TOOL],
            }
        ],
        [
            "<|im_start|>system\n"
            '[{"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}]'
            f"<|im_end|>\n{USER}Hi<|im_end|>\n{CALL}Hello<|im_end|>\n{USER}Time?<|im_end|>\n"
            f"{CALL}⟦<tool_call>{FUNCTION}</tool_call><|im_end|>⟧\n"
            f"<|im_start|>tool\n12:00<|im_end|>\n{CALL}⟦Noon<|im_end|>⟧"
        ],
        says=["1 conversations with 'tool_call_id' in tool messages, which the chat template leaves out"],
        note="Calls have a loss, results do not. A message with weight 0 is context. The legacy `functions` and "
        "`function_call` are read as tools and calls. A list `tools` in the system message is read as the column; a "
        "template that reads tools there gets them there.",
    ),
    Shown(
        "Reasoning",
        [{"messages": [TALK[0], {"role": "assistant", "reasoning_content": "A greeting.", "content": "Hello"}]}],
        [f"{USER}Hi<|im_end|>\n{CALL}⟦<think>\nA greeting.\n</think>\nHello<|im_end|>⟧"],
        note="The key may also be `reasoning` or `thinking`. It has a loss; a template that omits it is refused.",
    ),
    Shown(
        "ShareGPT",
        [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind"}],
        [f"<|im_start|>system\nBe kind<|im_end|>\n{HELLO}"],
        note="The roles `function_call` and `observation` are a call (JSON with name and arguments) and its result.",
    ),
    Shown(
        "Alpaca",
        [{"instruction": "Add", "input": "2 2", "output": "4", "history": [["Hi", "Hello"]]}],
        [f"{HELLO}\n{USER}Add\n\n2 2<|im_end|>\n{CALL}⟦4<|im_end|>⟧"],
        note="`history` holds earlier pairs of instruction and answer; these answers have a loss too. The base's chat "
        "template writes the turns; no preamble such as “Below is an instruction” is added.",
    ),
    Shown(
        "Alpaca with a rendering",
        [{"instruction": "Add", "input": "2 2", "output": "4", "text": "### Task: Add\n### Input: 2 2\n### Answer: 4"}],
        [f"{USER}Add\n\n2 2<|im_end|>\n{CALL}⟦4<|im_end|>⟧"],
        says=["columns ignored: text"],
        note="A column that another format reads is ignored if it only repeats what is read, and refused otherwise.",
    ),
    Shown(
        "Dolly",
        [{"instruction": "Who won?", "context": "A beat B.", "response": "A", "category": "qa"}],
        [f"{USER}Who won?\n\nA beat B.<|im_end|>\n{CALL}⟦A<|im_end|>⟧"],
        says=["columns ignored: category"],
    ),
    Shown(
        "Preference pairs",
        [{"prompt": "Capital of France?", "chosen": " Paris", "rejected": " Lyon"}],
        ["<|bos|>Capital of France?⟦ Paris<|eos|>⟧", "<|bos|>Capital of France?⟦ Lyon<|eos|>⟧"],
        note="Pairs need an objective such as `dpo`. A pair is a group of two examples, the chosen answer first. "
        "Prompt and answers may be messages, and the answers may repeat the prompt. `weight` is the pair's. A pair "
        "with a side beyond `data.max_length` is dropped and counted: nothing of a comparison is truncated.",
    ),
    Shown(
        "Pairs of conversations",
        [{"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "Go away"}]}],
        [HELLO, f"{USER}Hi<|im_end|>\n{CALL}⟦Go away<|im_end|>⟧"],
        note="The messages with which both begin are the prompt. Texts, as in HH-RLHF, share a prompt up to a line "
        "such as “Assistant:”.",
    ),
    Shown(
        "OpenAI's preference files",
        [
            {
                "input": {"messages": TALK[:1]},
                "preferred_output": TALK[1:],
                "non_preferred_output": [{"role": "assistant", "content": "Go away"}],
            }
        ],
        [HELLO, f"{USER}Hi<|im_end|>\n{CALL}⟦Go away<|im_end|>⟧"],
        note="`input` may also hold `tools`.",
    ),
    Shown(
        "Judged answers",
        [{"prompt": "Capital of France?", "completion": " Paris", "label": True}],
        ["<|bos|>Capital of France?⟦ Paris<|eos|>⟧"],
        note="The data of `kto`: `label` is true or false, or 1 or 0. Prompt and completion may be messages.",
    ),
    Shown(
        "Text and label",
        [{"text": "Fine weather", "label": "good"}, {"text": "It rains", "label": "bad"}],
        ["<|bos|>Fine weather → ⟦good⟧", "<|bos|>It rains → ⟦bad⟧"],
        task=CLASSIFICATION,
        note="For `base.task: sequence-classification`. A label is text or an integer; the classes are those of the "
        "training data.",
    ),
    Shown(
        "Pairs and triplets",
        [{"anchor": "Capital of France", "positive": "Paris", "negative": "Lyon"},
         {"anchor": "Highest mountain", "positive": "Everest"}],
        ["anchor: ⟦<|bos|>Capital of France⟧", "positive: ⟦<|bos|>Paris⟧", "negative: ⟦<|bos|>Lyon⟧",
         "anchor: ⟦<|bos|>Highest mountain⟧", "positive: ⟦<|bos|>Everest⟧"],
        task="embedding",
        note="For `base.task: embedding`. `negative` is a text, a list of texts, or left out; [tasks.md](tasks.md).",
    ),
    Shown(
        "",
        [{"query": "Highest mountain", "document": "Everest"}],
        ["anchor: ⟦<|bos|>Highest mountain⟧", "positive: ⟦<|bos|>Everest⟧"],
        task="embedding",
    ),
    Shown(
        "",
        [{"sentence1": "A plane lands", "sentence2": "An aircraft lands", "score": 4.6}],
        ["sentence1 (4.6): ⟦<|bos|>A plane lands⟧", "sentence2: ⟦<|bos|>An aircraft lands⟧"],
        task="embedding",
        note="Scores are of any scale: only their order within an optimizer step counts.",
    ),
    Shown(
        "Words and tags",
        [{"tokens": ["Ann", "visits", "New", "York"], "tags": ["B-PER", "O", "B-LOC", "I-LOC"]}],
        ["<|bos|>⟦An⟧n⟦ vis⟧its⟦ N⟧ew⟦ Y⟧ork → ⟦B-PER⟧"],
        task="token-classification",
        note="For `base.task: token-classification`. A word's label is at its first token (the page shows the first "
        "word's); the text is the words with spaces between them.",
    ),
    Shown(
        "",
        [{"text": "Ann visits New York.", "spans": [{"start": 0, "end": 3, "label": "PER"},
                                                    {"start": 11, "end": 19, "label": "LOC"}]}],
        ["<|bos|>⟦An⟧n⟦ vis⟧its⟦ N⟧ew⟦ Y⟧ork⟦.⟧ → ⟦B-PER⟧"],
        task="token-classification",
        note="Spans of characters, `end` exclusive, become tags of whole words.",
    ),
    Shown(
        "Text and score",
        [{"text": "Fine weather", "score": 0.9}],
        ["<|bos|>Fine weather → ⟦0.9⟧"],
        task="sequence-regression",
    ),
    Shown(
        "Image and class",
        [{"image": "digits/3.png", "label": "three"}, {"image": "digits/7.png", "label": "seven"}],
        ["image, 8 × 8 pixels, 3 channels → ⟦three⟧", "image, 8 × 8 pixels, 3 channels → ⟦seven⟧"],
        task="image-classification",
        note="Paths are relative to the folder of the data file. Parquet files and `datasets` folders may hold the "
        "bytes of images, as their type Image does. A folder that holds a folder of images for each class needs no "
        "file; `budwood data --sheet FILE.png` draws it.",
    ),
    Shown(
        "",
        [{"file_name": "digits/3.png", "label": 3}, {"file_name": "digits/7.png", "label": 7}],
        ["image, 8 × 8 pixels, 3 channels → ⟦3⟧", "image, 8 × 8 pixels, 3 channels → ⟦7⟧"],
        task="image-classification",
    ),
    Shown(
        "Image",
        [{"image": "digits/3.png"}],
        ["image, 8 × 8 pixels; masked ■ of its patches: □□⟦■■⟧ ⟦■■■■⟧ □□⟦■⟧□ ⟦■■⟧□⟦■⟧"],
        task="masked-image",
        note="Without a file: a folder of images, also one with folders of classes, whose names are not read.",
    ),
]  # fmt: skip

CHOICES = [
    Shown(
        "`data.loss_on: last`",
        [{"messages": MORE}],
        [f"{HELLO.replace('⟦', '').replace('⟧', '')}\n{USER}And?<|im_end|>\n{CALL}⟦Bye<|im_end|>⟧"],
        options={"loss_on": "last"},
    ),
    Shown(
        "`data.loss_on: all`",
        [{"messages": TALK}],
        [f"<|im_start|>⟦user\nHi<|im_end|>\n{CALL}Hello<|im_end|>\n⟧"],
        note="The first token has no loss, since nothing precedes it.",
        options={"loss_on": "all"},
    ),
    Shown(
        "A template that rewrites earlier turns",
        [{"messages": [
            TALK[0], {"role": "assistant", "reasoning_content": "Easy.", "content": "Hello"},
            MORE[2], {"role": "assistant", "reasoning_content": "The end.", "content": "Bye"},
        ]}],
        [
            f"{USER}Hi<|im_end|>\n{CALL}⟦<think>\nEasy.\n</think>\nHello<|im_end|>⟧",
            f"{USER}Hi<|im_end|>\n{CALL}Hello<|im_end|>\n{USER}And?<|im_end|>\n"
            f"{CALL}⟦<think>\nThe end.\n</think>\nBye<|im_end|>⟧",
        ],
        says=["1 conversations split, since the chat template rewrites earlier turns"],
        note="This template drops the reasoning of earlier answers. The conversation is split so that each answer is "
        "trained on after exactly the tokens that precede it in generation.",
    ),
    Shown(
        "`data.template_options: {enable_thinking: true}`",
        [{"messages": [TALK[0], {"role": "assistant", "reasoning_content": "Easy.", "content": "Hello"}, *MORE[2:]]}],
        [
            f"{USER}Hi<|im_end|>\n{CALL}⟦<think>\nEasy.\n</think>\nHello<|im_end|>⟧\n"
            f"{USER}And?<|im_end|>\n{CALL}⟦Bye<|im_end|>⟧"
        ],
        note="Variables of the template, which defines their names. In this one, `enable_thinking` keeps the reasoning "
        "of earlier answers. A column `chat_template_kwargs` sets them for its row.",
        options={"template_options": {"enable_thinking": True}},
    ),
    Shown(
        "`data.chat_template: dated.jinja`, which writes the date",
        [{"messages": TALK}],
        [f"Today is 28 Nov 2026.{HELLO}"],
        says=["the chat template writes the date 2026-11-28"],
        note="The date on which the run starts is used throughout and is saved with the adapter.",
        options={"date": "2026-11-28"},
        template=DATED,
    ),
    Shown(
        "`data.max_length: 12`",
        [{"prompt": "a:", "completion": " one two three four five six seven eight nine ten"}],
        ["<|bos|>a:⟦ one two three four five six⟧"],
        says=["1 truncated at 12"],
        note="The example is truncated, without an end token, so the model does not learn to stop there. A row whose "
        "whole answer would be cut off is dropped and counted.",
        options={"max_length": 12},
    ),
    Shown(
        "`data.on_bad_row: skip`",
        '{"prompt": "a:", "completion": " b"}\n{"prompt": "a:", "completion": null}\n{"prompt": "a:"\n',
        ["<|bos|>a:⟦ b<|eos|>⟧"],
        says=[
            "2 skipped (malformed JSON at column N: Expecting ',' delimiter 1, first at FILE:3; "
            "field 'completion' must be text, not null 1, first at FILE:2)"
        ],
        note="Skipped rows are written to `skipped.jsonl`. By default (`refuse`), the first bad row is an error:",
        options={"skip_bad_rows": True},
    ),
    Shown(
        "",
        '{"prompt": "a:", "completion": " b"}\n{"prompt": "a:", "completion": null}\n',
        "FILE:2: field 'completion' must be text, not null.",
    ),
    Shown(
        "CSV",
        'prompt,completion\n"a: ","b"\n"c: ",NaN\n',
        ["<|bos|>a: ⟦b<|eos|>⟧"],
        says=[
            "1 dropped (empty completion 1, first at FILE:3)",
            "read as empty fields, since they mean a missing value: 1 NaN (as text, give them in JSONL)",
        ],
        note="The same applies to `NULL`, `null`, `<NA>`, `#N/A` and `\\N`. “NA” and “None” may be words, and are read "
        "as text.",
        name="train.csv",
    ),
]  # fmt: skip

REFUSED = [
    Shown(
        "",
        [{"question": "2 + 2?", "answer": "4"}],
        "FILE: columns 'question', 'answer' match no data format. Rename 'question' to 'instruction' and 'answer' to "
        "'output', for a chat model; or 'question' to 'prompt' and 'answer' to 'completion', for plain text. Accepted: "
        "instruction + output; conversation; instruction + response; prompt + completion + label; messages; prompt + "
        "chosen + rejected; input + preferred_output + non_preferred_output; chosen + rejected; prompt + completion; "
        "prompt; conversations; text.",
    ),
    Shown(
        "",
        [{"instruction": "Add 2 and 2", "output": "4", "text": "Something else"}],
        "FILE:1: instruction + output does not read column 'text', which would be left out. Move it to a column that "
        "is read, or remove it.",
    ),
    Shown(
        "",
        [{"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"}],
        "FILE:1: 'chosen' and 'rejected' are equal, so neither is preferred. Remove the row.",
    ),
    Shown(
        "",
        [{"tokens": ["A", "dog"], "ner_tags": ["O", "B"]}],
        "FILE: columns tokens + ner_tags are a tag for each token: rename 'ner_tags' to 'tags', and set base.task: "
        "token-classification.",
    ),
    Shown(
        "",
        [{"text": "Fine weather", "label": "good"}],
        "FILE: text + label is data for sequence-classification, but the task is causal-lm. Set base.task: "
        "sequence-classification, or remove 'label' to train on text alone.",
    ),
    Shown(
        "",
        [{"prompt": "Hi", "completion": "Hello", "context": "A greeting"}],
        "FILE:1: prompt + completion does not read column 'context', which would be left out. Move it to a column that "
        "is read, or remove it.",
    ),
    Shown(
        "",
        [{"messages": [{"role": "user", "content": "Hi", "mood": "glad"}, TALK[1]]}],
        "FILE:1: the chat template leaves out 'mood' of message 1 (user). Remove it, or give a template that "
        "renders it with data.chat_template.",
    ),
]

FILES = [
    Found("mine.jsonl", ["mine.jsonl"], ["mine.jsonl"]),
    Found("parts/*.jsonl", ["parts/a.jsonl", "parts/b.jsonl", "parts/c.csv"], ["parts/a.jsonl", "parts/b.jsonl"]),
    Found(
        "chats",
        ["chats/data/train-00000-of-00001.parquet", "chats/README.md"],
        ["chats/data/train-00000-of-00001.parquet"],
    ),
    Found("chats", ["chats/train.jsonl", "chats/test.jsonl"], ["chats/train.jsonl"], split="train"),
    Found(
        "chats",
        ["chats/train.jsonl", "chats/test.jsonl"],
        "chats: holds the splits test, train. Name one of them: chats/train*.jsonl, or {path: chats, split: train} "
        "in a recipe.",
    ),
    Found(
        "chats",
        ["chats/plain_text/train-00000-of-00001.parquet", "chats/README.md"],
        ["chats/plain_text/train-00000-of-00001.parquet"],
    ),
    Found(
        "chats",
        ["chats/default/train/0.parquet", "chats/default/test/0.parquet"],
        ["chats/default/train/0.parquet"],
        split="train",
    ),
    Found("chats", ["chats/en/train.jsonl", "chats/de/train.jsonl"], ["chats/de/train.jsonl"], config="de"),
    Found(
        "chats",
        ["chats/en/train.jsonl", "chats/de/train.jsonl"],
        "chats: holds data in the folders de, en. Name one of them: {path: chats, config: de} in a recipe.",
    ),
    Found(
        "chats",
        ["chats/train/0.parquet", "chats/test/0.parquet"],
        "chats: holds data in the folders test, train. Name one of them: {path: chats, split: train} in a recipe.",
    ),
    Found(
        "chats",
        ["chats/en_train.jsonl", "chats/en_test.jsonl"],
        "chats: holds the splits test, train. Name one of them: {path: chats, split: train} in a recipe.",
    ),
    Found(
        "digits",
        ["digits/one/a.png", "digits/two/b.jpg", "digits/two/c.txt"],
        ["digits/one/a.png", "digits/two/b.jpg"],
    ),
    Found(
        "digits",
        ["digits/train/one/a.png", "digits/test/one/b.png"],
        "digits: holds the splits test, train. Name one of them: digits/test.",
    ),
    Found(
        "train.jsonl.gz",
        ["train.jsonl.gz"],
        "train.jsonl.gz: compressed files are not supported. Decompress it first.",
    ),
]


def page_tokenizer(template: str) -> Any:
    """Return the demo base's tokenizer with the tokens of `TEMPLATE` and a given template."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def write_file(shown: Shown, folder: Path) -> Path:
    """Write the file of an example; return its path."""
    path = folder / shown.name
    rows = shown.rows
    text = rows if isinstance(rows, str) else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    for row in () if isinstance(rows, str) else rows:
        image = row.get("image") or row.get("file_name")
        if isinstance(image, str) and image.endswith(".png"):
            (folder / image).parent.mkdir(exist_ok=True)
            Image.new("RGB", (20, 20), "grey").save(folder / image)
    return path


def read_base(task: Any, folder: Path) -> None:
    """Let a task on images read a base for images of 8 × 8 pixels, without weights."""
    base = folder / "base"
    ViTConfig(image_size=8, patch_size=2, encoder_stride=2).save_pretrained(base)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(base)
    task.read_base(base)


def see(shown: Shown, folder: Path) -> tuple[Sequence[str] | str, str]:
    """Return what training makes of a file, in the form of `Shown.sees`, and the line about the data."""
    path, tokenizer = write_file(shown, folder), page_tokenizer(shown.template)
    task = create(shown.task, "budwood.tasks")
    if not task.needs_tokenizer:
        read_base(task, folder)
    try:
        examples = build_examples(path, tokenizer, task, **{"max_length": 512, **shown.options})
    except InputError as error:
        return str(error).replace(str(path), "FILE"), ""
    texts = []
    for example in examples:
        text = "".join(f"⟦{piece}⟧" if loss else piece for piece, loss in task.show(example, tokenizer))
        texts.append(text + (f" → ⟦{examples.labels[int(example.labels[0])]}⟧" if examples.labels else ""))
    return texts, examples.describe().replace(str(path), "FILE")


def find(found: Found, folder: Path) -> Sequence[str] | str:
    """Return the files that a source selects, in the form of `Found.found`."""
    for name in found.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n", encoding="utf-8")
    try:
        files = find_files(folder / found.source, found.split, config=found.config)
    except InputError as error:
        return str(error).replace(f"{folder}/", "")
    return [str(file.relative_to(folder)) for file in files]
