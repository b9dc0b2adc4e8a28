"""A tokenizer as llama.cpp knows it: byte-level BPE whose splits, merges and special tokens are provably the same.

llama.cpp implements each way of splitting a text into words by itself and looks it up by a name. A tokenizer is written
only if tokenizer.json is one of those ways; anything that llama.cpp would do differently is refused by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from budwood.errors import InputError
from budwood.untrusted.formats import read_json
from budwood.untrusted.redaction import shorten

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's types of tokens."""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + _WORDS + r"\p{N}" + _REST
_SPLITS = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2"}
_STRIPS = ("lstrip", "rstrip", "single_word")
_TOKENIZER_MAX = 1 << 28


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer.

    Attributes:
        pre: llama.cpp's name of the way in which a text is split.
        tokens: texts by id, padded with unused ones to the rows of the embeddings.
        types: llama.cpp's type of each token.
        merges: as in tokenizer.json, best first.
        special: token ids by llama.cpp's name: bos, eos, unknown, padding, eot, eom.
        add_bos: whether a text begins with the first of these.
        add_eos: whether a text ends with the second.
        template: the chat template; None if there is none.
        notes: messages for the user.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    template: str | None
    notes: list[str] = field(default_factory=list)


def read_vocabulary(
    folder: Path, tokenizer: Any, rows: int, ends: list[int], template: str | None, messages: bool = True
) -> Vocabulary:
    """Read the tokenizer of a model folder.

    Args:
        folder: the model's folder.
        tokenizer: the same tokenizer, loaded.
        rows: number of the model's embeddings.
        ends: tokens that end an answer, the most important first.
        template: chat template of the adapter's run; None: the tokenizer's.
        messages: whether texts are messages; without them there is no chat template.

    Raises:
        InputError: llama.cpp would tokenise differently; the message says in what.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: is missing, and GGUF is written from it only.")
    values = read_json(path, _TOKENIZER_MAX)
    model = values.get("model") or {}
    _check_model(path, values, model)
    notes = []
    pre = _split(path, values.get("pre_tokenizer"), bool(model.get("ignore_merges")), tokenizer)
    if (values.get("normalizer") or {}).get("type") == "NFC":
        notes.append("llama.cpp does not compose characters (NFC) before it tokenises, as the tokenizer does.")
    tokens, types = _tokens(path, values, tokenizer, rows)
    special, more = _special(tokenizer, ends)
    notes += more
    template = (template or _template(tokenizer)) if messages else None
    if not messages and _template(tokenizer):
        notes.append(
            "it was trained on texts, not on messages: the file has no chat template, so that none is applied."
        )
    add_bos, add_eos = _added(path, tokenizer, special)
    if add_bos and template is not None and not _begins(template, tokenizer):
        add_bos = False
        notes.append("the chat template does not begin with the bos token, so llama.cpp begins no text with it.")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(pre, tokens, types, merges, special, add_bos, add_eos, template, notes)


def _check_model(path: Path, values: dict[str, Any], model: dict[str, Any]) -> None:
    kind = model.get("type")
    normalizer = (values.get("normalizer") or {}).get("type")
    problems = {
        f"model: {kind}{' with byte_fallback' if model.get('byte_fallback') else ''} (SentencePiece)": (
            kind != "BPE" or model.get("byte_fallback")
        ),
        "dropout": model.get("dropout"),
        "unk_token": model.get("unk_token") and model.get("fuse_unk"),
        "continuing_subword_prefix": model.get("continuing_subword_prefix"),
        "end_of_word_suffix": model.get("end_of_word_suffix"),
        f"normalizer: {normalizer}": normalizer not in (None, "NFC"),
    }
    if problem := next((name for name, found in problems.items() if found), None):
        raise InputError(
            f"{path}: {shorten(problem)}: only byte-level BPE is written as GGUF: merge the adapter "
            "(--for merged), and convert the folder with llama.cpp's convert_hf_to_gguf.py."
        )


def _split(path: Path, found: Any, ignore_merges: bool, tokenizer: Any) -> str:
    """Return llama.cpp's name of a way of splitting.

    Raises:
        InputError: it has none.
    """
    steps: list[Any] = [found]
    if isinstance(found, dict) and found.get("type") == "Sequence":
        steps = found.get("pretokenizers") or []
    byte_level = steps[-1] if steps else None
    name = None
    if (
        isinstance(byte_level, dict)
        and byte_level.get("type") == "ByteLevel"
        and not byte_level.get("add_prefix_space", True)
    ):
        first, words = steps[:-1], byte_level.get("use_regex", True)
        if words:
            digits = [{"type": "Digits", "individual_digits": True}]
            name = "gpt-2" if not first else "smollm" if first == digits else None
        elif len(first) == 1 and first[0].get("type") == "Split" and not first[0].get("invert"):
            pattern = first[0].get("pattern", {}).get("Regex")
            name = _SPLITS.get(pattern) if first[0].get("behavior") == "Isolated" else None
    if name is None:
        shown = shorten(json.dumps(found))
        raise InputError(f"{path}: pre_tokenizer {shown}: llama.cpp has no name for it that is known here.")
    if (name == "llama-bpe") == ignore_merges:
        return name
    if name == "llama-bpe":
        return "smaug-bpe"  # the same words, merged even if they are tokens
    if whole := next((t for t in tokenizer.get_vocab() if not _merges_to_itself(tokenizer, t)), None):
        raise InputError(f"{path}: ignore_merges: llama.cpp merges words of '{name}', which changes {whole!r}.")
    return name


def _merges_to_itself(tokenizer: Any, token: str) -> bool:
    if token in tokenizer.get_added_vocab():
        return True
    return [t.value for t in tokenizer.backend_tokenizer.model.tokenize(token)] == [token]


def _tokens(path: Path, values: dict[str, Any], tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    """Return text and type of every token id."""
    by_id = {number: (text, NORMAL) for text, number in values["model"]["vocab"].items()}
    loaded = [
        {"id": number} | {name: getattr(token, name) for name in ("content", "special", *_STRIPS)}
        for number, token in tokenizer.added_tokens_decoder.items()  # also those of tokenizer_config.json
    ]
    for token in [*(values.get("added_tokens") or ()), *loaded]:
        if what := next((name for name in _STRIPS if token.get(name)), None):
            raise InputError(f"{path}: added token {token['content']!r}: {what}: llama.cpp does not do this.")
        by_id[token["id"]] = (token["content"], CONTROL if token.get("special") else USER_DEFINED)
    if max(by_id) >= rows:
        raise InputError(f"{path}: has {max(by_id) + 1:,} tokens, but the model only {rows:,} embeddings.")
    pairs = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    return [text for text, _ in pairs], [kind for _, kind in pairs]


def _special(tokenizer: Any, ends: list[int]) -> tuple[dict[str, int], list[str]]:
    """Return special tokens by name; the tokens that end an answer take the names eos, eot and eom, in this order."""
    found = {"bos": tokenizer.bos_token_id, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    names = ("eos", "eot", "eom")
    found |= dict(zip(names, ends, strict=False))
    lost = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in ends[len(names) :])
    notes = (
        [f"llama.cpp has no place for more than three tokens that end an answer: pass {lost} as stop"] if lost else []
    )
    return {name: int(token) for name, token in found.items() if token is not None}, notes


def _added(path: Path, tokenizer: Any, special: dict[str, int]) -> tuple[bool, bool]:
    """Return whether the tokenizer puts bos before a text, and eos behind it."""
    whole, plain = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    bos, eos = [special.get("bos")], [tokenizer.eos_token_id]
    for start, end in (([], []), (bos, []), ([], eos), (bos, eos)):
        if whole == [*start, *plain, *end]:
            return bool(start), bool(end)
    raise InputError(
        f"{path}: post_processor: puts other tokens than bos and eos around a text, which llama.cpp cannot."
    )


def _template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template or None


def _begins(template: str, tokenizer: Any) -> bool:
    """Return whether a chat template writes the bos token before a conversation, of which llama.cpp keeps one."""
    from budwood.serving.exports.conversation import rendered

    text = rendered(template, tokenizer, [[{"role": "user", "content": "a"}]])[0]
    return text is not None and text.startswith(tokenizer.bos_token)
