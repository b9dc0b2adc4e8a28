"""Finds the assistant's turns in what a chat template writes.

Nothing is guessed from a template's source. Each answer is rendered as it is generated: after the messages before it,
with the generation prompt, and as the last message. Where the whole conversation goes on from exactly that text, it is
one example. Where the template rewrites earlier turns (it drops their reasoning, or ends them differently), the
conversation is split into prefixes, each of which ends with an answer as it was generated.

Of a conversation with many answers, those that are plain text are rendered so in part, since each rendering is as long
as the conversation. The others must be written in it exactly as these are; otherwise each is rendered after all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from budwood.data.encoder import Encoder, Request, Span
from budwood.data.forms import FORMS, Form, Message, find_left_out, says_none
from budwood.data.messages import LINKS, REASONING, Conversation
from budwood.data.template import REMEDY, Template
from budwood.data.tools import PROBE
from budwood.errors import InputError
from budwood.untrusted.chat_template import Rendered
from budwood.untrusted.redaction import shorten

RENDERED = 16
"""Number of plain answers of a conversation, spread over it, that are rendered as they are generated."""


@dataclass(frozen=True, slots=True)
class Turns:
    """A text and its (start, stop) in characters that have a loss, with the weight of each."""

    text: str
    spans: Sequence[Span]
    weights: Sequence[float]


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer at the end of `text`, of which `spans` have a loss."""

    number: int
    text: str
    spans: Sequence[Span]
    weight: float


def find_turns(items: Sequence[Conversation], where: Sequence[str], encoder: Encoder) -> Iterator[list[Turns]]:
    """Yield the texts to train on for each conversation; none if no message has a loss.

    Raises:
        InputError: the chat template rejects a conversation, leaves out part of it, or does not show where an answer
            begins and ends.
    """
    templates = {False: Template(encoder), True: Template(encoder, PROBE)}
    form = FORMS[0]
    rendered = encoder.chat(request for item in items for request in _requests(item, encoder.loss_on, form))
    for item, place in zip(items, where, strict=True):
        mine = islice(rendered, sum(1 for _ in _requests(item, encoder.loss_on, form)))
        remarks, template = encoder.remarks.copy(), templates[bool(item.tools)]
        try:
            yield _find(item, place, encoder, template, mine, form)
        except _Unlike:
            encoder.remarks = remarks
            every = encoder.chat(_requests(item, encoder.loss_on, form, every=True))
            yield _find(item, place, encoder, template, every, form, every=True)
        except InputError as error:
            for _ in mine:
                pass
            yield _find_in_other_form(item, place, encoder, template, error)


_REJECTS = "the chat template rejects the conversation"


def _find_in_other_form(
    item: Conversation, where: str, encoder: Encoder, template: Template, error: InputError
) -> list[Turns]:
    """Find a conversation's turns in another form that a template may expect; else raise the first one's error."""
    tried = [[FORMS[0](message) for message in item.messages]]
    for form in FORMS[1:]:
        messages = [form(message) for message in item.messages]
        if messages in tried:
            continue
        tried.append(messages)
        rendered = encoder.chat(_requests(item, encoder.loss_on, form, every=True))
        try:
            found = _find(item, where, encoder, template, rendered, form, every=True)
            if _is_generated_from(item, encoder, form):
                return found
        except InputError as other:
            # A template that takes a form says more about what is wrong than its complaint about another form.
            if _REJECTS in str(error) and _REJECTS not in str(other):
                error = other
    raise error


def _is_generated_from(item: Conversation, encoder: Encoder, form: Form) -> bool:
    """Return whether each answer's prompt in a form is the one from which it would be generated."""
    if encoder.loss_on == "all":
        return True
    prompts = [
        Request(item.messages[:index], item.tools, item.options, prompt=True)
        for index in _trained(item, encoder.loss_on)
    ]
    written = (replace(prompt, messages=[form(message) for message in prompt.messages]) for prompt in prompts)
    return list(encoder.chat(written)) == [encoder.prompt(prompt) for prompt in prompts]


def _trained(item: Conversation, loss_on: str) -> list[int]:
    """Return the indices of the messages that have a loss."""
    if loss_on == "all":
        return [len(item.messages) - 1] if any(item.weights) else []
    answers = [index for index, message in enumerate(item.messages) if message["role"] == "assistant"]
    return [index for index in (answers[-1:] if loss_on == "last" else answers) if item.weights[index]]


def _rendered(item: Conversation, trained: Sequence[int], every: bool) -> list[int]:
    """Return the indices of the answers that are rendered as they are generated: the last one, and all that differ."""
    plain = [index for index in trained if _is_plain(item, index)]
    if every or len(plain) <= RENDERED:
        return list(trained)
    step = (len(plain) - 1) / (RENDERED - 1)
    spread = {plain[round(number * step)] for number in range(RENDERED)}
    return [index for index in trained if index in spread or index == trained[-1] or not _is_plain(item, index)]


def _is_plain(item: Conversation, index: int) -> bool:
    """Return whether an answer, and the message before it, are text alone, so that it can be looked for."""
    before, answer = item.messages[max(index - 1, 0)], item.messages[index]
    texts = answer.keys() == {"role", "content"} and "think>" not in answer["content"]
    return index > 0 and texts and bool(answer["content"].strip() and before["content"].strip())


def _requests(item: Conversation, loss_on: str, form: Form, every: bool = False) -> Iterator[Request]:
    """Yield the renderings that `_find` reads, in order; messages are written in a `form` that the template expects."""
    trained = _trained(item, loss_on)
    if not trained:
        return
    messages = [form(message) for message in item.messages]
    whole = Request(messages[: trained[-1] + 1], item.tools, item.options)
    yield whole
    for _, _, less in _variants(whole):
        yield less
    if loss_on == "all":
        return
    for index in _rendered(item, trained, every):
        yield replace(whole, messages=messages[:index], prompt=True)
        if index != trained[-1]:
            yield replace(whole, messages=messages[: index + 1])


def _variants(whole: Request) -> Iterator[tuple[str, str, Request]]:
    """Yield the conversation without one role's values of one key, for every key that a template need not know."""
    pairs = {
        (m["role"], key): None for m in whole.messages for key in m if key not in ("role", "content", "tool_calls")
    }
    for role, key in pairs:
        if key in REASONING:
            continue  # each answer's reasoning is looked for in its own text
        messages = [{k: v for k, v in m.items() if k != key or m["role"] != role} for m in whole.messages]
        yield role, key, replace(whole, messages=messages)
    if whole.tools:
        yield "", "tools", replace(whole, tools=())


def _find(
    item: Conversation,
    where: str,
    encoder: Encoder,
    template: Template,
    rendered: Iterator[Rendered | InputError],
    form: Form,
    every: bool = False,
) -> list[Turns]:
    trained = _trained(item, encoder.loss_on)
    if not trained:
        return []
    whole = _next(rendered, where)
    if says_none([form(message) for message in item.messages], whole):
        raise InputError(f"{where}: the chat template writes 'None' for content that is missing.")
    _check_variants(item, whole, where, encoder, trained[-1], rendered)
    if any(message["role"] != "assistant" for message in item.messages[trained[-1] + 1 :]):
        encoder.remarks["conversations with messages after the last answer, which are left out"] += 1
    if item.tools and encoder.tool_form is not None:
        encoder.remarks["conversations whose tools are in the system message, where the chat template reads them"] += 1
    for key in sorted(item.ignored):
        encoder.remarks[f"conversations with '{key}' in messages, which is ignored"] += 1
    spelled = any(encoder.end_marks.search(message["content"]) for message in item.messages)
    if spelled:
        encoder.remarks["conversations that spell out control tokens, which are read as such"] += 1
    if encoder.loss_on == "all":
        return [_everything(item, whole, where, encoder, template)]
    found: list[_Answer] = []
    for index in _rendered(item, trained, every):
        before = _next(rendered, where)
        after = whole if index == trained[-1] else _next(rendered, where)
        _check_contents(item.messages[:index], before, where)
        text, spans = template.locate(item.messages[index], f"{where}: message {index + 1}", before, after)
        _check_contents(item.messages[:index], text, where)
        if index != trained[-1] and whole.startswith(text):
            text = ""  # the beginning of the whole: copies would take memory quadratic in the number of turns
        found.append(_Answer(index, text, spans, item.weights[index]))
    if len(found) < len(trained):
        if spelled:
            raise _Unlike
        found = _fill_in(item, trained, found, whole)
    return _group(found, whole, encoder)


class _Unlike(Exception):
    """An answer is not written as those that were rendered."""


def _fill_in(item: Conversation, trained: Sequence[int], found: Sequence[_Answer], whole: Rendered) -> list[_Answer]:
    """Add the plain answers that were not rendered: they are where the text goes on as at those that were.

    Raises:
        _Unlike: it does not.
    """
    known = {answer.number: answer for answer in found}
    frames: dict[str, tuple[str, str, str]] = {}
    for answer in found:
        if answer.text and answer is not found[-1] or len(answer.spans) > 1:
            raise _Unlike  # the template rewrites earlier turns, or marks parts of an answer
        if not _is_plain(item, answer.number):
            continue
        before, said = item.messages[answer.number - 1], item.messages[answer.number]["content"].strip()
        start, stop = answer.spans[0]
        at = whole.rfind(before["content"].strip(), 0, start)
        lead, words, tail = whole[start:stop].partition(said)
        frame = (whole[at + len(before["content"].strip()) : start], lead, tail)
        if at < 0 or not words or frames.setdefault(before["role"], frame) != frame:
            raise _Unlike
    at, answers = 0, []
    for index in trained:
        if index not in known:
            before, said = item.messages[index - 1], item.messages[index]["content"].strip()
            if before["role"] not in frames:
                raise _Unlike
            between, lead, tail = frames[before["role"]]
            asked = before["content"].strip() + between
            at = whole.find(f"{asked}{lead}{said}{tail}", at)
            if at < 0:
                raise _Unlike
            start = at + len(asked)
            known[index] = _Answer(index, "", [(start, start + len(lead + said + tail))], item.weights[index])
        answers.append(known[index])
        at = known[index].spans[-1][1]
    return answers


def _group(found: list[_Answer], whole: str, encoder: Encoder) -> list[Turns]:
    """Join the answers whose texts begin the text of a later one."""
    shared = len(os.path.commonprefix([whole, found[-1].text]))
    inside = [answer for answer in found[:-1] if not answer.text and answer.spans[-1][1] <= shared]
    rest = [answer for answer in found[:-1] if answer not in inside]
    rest = [answer if answer.text else replace(answer, text=whole[: answer.spans[-1][1]]) for answer in rest]
    groups = [[*inside, found[-1]]]
    if rest:
        encoder.remarks["conversations split, since the chat template rewrites earlier turns"] += 1
    while rest:
        last = rest.pop()
        groups.append([answer for answer in rest if last.text.startswith(answer.text)] + [last])
        rest = [answer for answer in rest if not last.text.startswith(answer.text)]
    turns = []
    for group in reversed(groups):
        spans = [(span, answer.weight) for answer in group for span in answer.spans]
        turns.append(Turns(group[-1].text, [span for span, _ in spans], [weight for _, weight in spans]))
    return turns


def _everything(item: Conversation, whole: str, where: str, encoder: Encoder, template: Template) -> Turns:
    weights = {w for w, m in zip(item.weights, item.messages, strict=True) if m["role"] == "assistant"}
    if len(weights) > 1:
        raise InputError(
            f"{where}: with data.loss_on: all, messages cannot have weights of their own. "
            "Remove them, or set data.loss_on: assistant."
        )
    _check_contents(item.messages, whole, where, everyone=True)
    ends = list(encoder.end_marks.finditer(template.closing))
    encoder.stop_ids.update(encoder.tokenizer.convert_tokens_to_ids([mark[0] for mark in ends[-1:]]))
    return Turns(whole, [(0, len(whole))], list(weights))


def _check_variants(
    item: Conversation, whole: str, where: str, encoder: Encoder, last: int, rendered: Iterator[Rendered | InputError]
) -> None:
    """Refuse, or report, what the template does not render: the text is the same without it."""
    for role, key, _ in _variants(Request(item.messages[: last + 1], item.tools)):
        text = next(rendered)
        if text != whole:
            continue
        if role == "tool" and key in LINKS:
            encoder.remarks[f"conversations with '{key}' in tool messages, which the chat template leaves out"] += 1
            continue
        if not role:
            raise InputError(
                f"{where}: the chat template leaves out the column '{key}'. Remove it, or give a template that renders "
                "it with data.chat_template."
            )
        number = next(n for n, m in enumerate(item.messages, 1) if key in m and m["role"] == role)
        raise InputError(
            f"{where}: the chat template leaves out '{shorten(key)}' of message {number} ({role}). "
            "Remove it, or give a template that renders it with data.chat_template."
        )
    names = [tool["function"]["name"] for tool in item.tools]
    missing = next((name for name in names if name not in whole), None)
    if missing is not None:
        raise InputError(f"{where}: the chat template leaves out the tool '{shorten(missing)}'.")


def _check_contents(messages: Sequence[Message], text: str, where: str, everyone: bool = False) -> None:
    index = find_left_out(messages, text, everyone)
    if index is not None:
        role = messages[index]["role"]
        raise InputError(f"{where}: the chat template leaves out or changes message {index + 1} ({role}). {REMEDY}")


def _next(rendered: Iterator[Rendered | InputError], where: str) -> Rendered:
    text = next(rendered)
    if isinstance(text, InputError):
        raise InputError(f"{where}: {text}")
    return text
