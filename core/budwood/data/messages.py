"""Reads chat messages as people write them, and brings them into the one form that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from budwood.data.fields import describe_type, encodable, read_weight, type_name
from budwood.data.rows import Row
from budwood.errors import InputError, did_you_mean
from budwood.untrusted.redaction import shorten

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function": "tool", "observation": "tool", "function_response": "tool",
    "tool_response": "tool",
}  # fmt: skip
"""Roles of ShareGPT files, and the legacy one of OpenAI's function results."""
CALLS = ("function_call", "tool_call")
"""ShareGPT roles whose text is a call, as JSON with name and arguments."""
FLAGS = ("train", "training", "trainable", "loss", "loss_mask")
"""Keys of a message that say whether it has a loss: true or false, or 1 or 0."""
REASONING = ("reasoning_content", "reasoning", "thinking")
LINKS = ("tool_call_id", "name", "id")
"""Keys that link a tool's result to its call; most templates do not render them."""
METADATA = (
    "id", "uuid", "index", "message_id", "parent_id", "timestamp", "created_at", "date", "model", "source", "url",
    "lang", "language", "score", "rating",
)  # fmt: skip
"""Keys of a message that describe it, and are ignored."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the chat template, and the loss of each.

    Attributes:
        messages: with role, content, and whatever else the template may render; assistant messages may have tool_calls.
        weights: weight of each message's loss; 0 except for assistant messages.
        tools: definitions of the tools, as the template takes them.
        options: variables for the template that the row sets.
        ignored: keys of messages that are metadata and were left out.
    """

    messages: Sequence[Mapping[str, Any]]
    weights: Sequence[float]
    tools: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()


def read_conversation(row: Row, column: str, where: str) -> Conversation:
    """Read a row's messages with the columns beside them: system, tools, functions, chat_template_kwargs.

    Raises:
        InputError: a message or column is malformed.
    """
    messages, weights, ignored = read_messages(row.get(column), f"field '{column}'", column in row, where)
    return with_columns(row, messages, weights, ignored, where)


def with_columns(
    row: Row, messages: list[dict[str, Any]], weights: list[float], ignored: frozenset[str], where: str
) -> Conversation:
    """Return a conversation with what a row's columns system, tools, functions and chat_template_kwargs add to it."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise InputError(f"{where}: field 'system' must be text, not {describe_type(row, 'system')}.")
    if system and system.strip():
        if messages[0]["role"] in ("system", "developer"):
            raise InputError(f"{where}: both column 'system' and message 1 are a system prompt. Keep one of them.")
        messages = [{"role": "system", "content": encodable(system, "field 'system'", where)}, *messages]
        weights = [0.0, *weights]
    tools = _tools(row, where)
    if isinstance(messages[0].get("tools"), list) and messages[0]["role"] == "system":
        if tools:
            raise InputError(f"{where}: both the row and message 1 have tools. Keep one of them.")
        tools = _tools({"tools": messages[0]["tools"]}, f"{where}: message 1")
        messages = [{key: value for key, value in messages[0].items() if key != "tools"}, *messages[1:]]
    options = _parsed(row.get("chat_template_kwargs"), "field 'chat_template_kwargs'", where) or {}
    if not isinstance(options, Mapping):
        raise InputError(f"{where}: field 'chat_template_kwargs' must be an object.")
    options = {key: value for key, value in options.items() if value is not None}
    return Conversation(messages, weights, tools, options, ignored)


def read_messages(
    value: Any, name: str, present: bool, where: str
) -> tuple[list[dict[str, Any]], list[float], frozenset[str]]:
    """Read a list of messages: role and content, ShareGPT's from and value, or pairs of input and output.

    Args:
        value: the list.
        name: what to call it in errors, such as "field 'messages'".
        present: whether the row has it.
        where: the row's location.

    Returns:
        The messages, the weight of each message's loss (0 except for the assistant's), and the ignored keys.

    Raises:
        InputError: it is not a list of messages, or a message is malformed.
    """
    if not isinstance(value, list):
        raise InputError(
            f"{where}: {name} must be a list, not {describe_type({name: value} if present else {}, name)}."
        )
    if not value:
        raise InputError(f"{where}: {name} is empty.")
    if all(isinstance(pair, dict) and pair.keys() == {"input", "output"} for pair in value):  # a turn each: Capybara
        turns = (("user", "input"), ("assistant", "output"))
        value = [{"role": role, "content": pair[key]} for pair in value for role, key in turns]
    messages: list[dict[str, Any]] = []
    weights: list[float] = []
    ignored: set[str] = set()
    for number, given in enumerate(value, 1):
        place = f"{where}: message {number}"
        if not isinstance(given, dict):
            what = "a text without a role: it" if isinstance(given, str) else f"{type_name(given)}: it"
            raise InputError(f"{place} is {what} must be an object with role and content.")
        message, weight = _read_message(given, place)
        dropped = {key for key in message if key in METADATA}
        ignored |= dropped
        message = {key: value for key, value in message.items() if key not in dropped}
        if _is_call(given) and messages and weights[-1] == weight and _are_one_turn(messages[-1], message):
            before = messages.pop()
            message |= before | {"tool_calls": [*before.get("tool_calls", ()), *message["tool_calls"]]}
            weights.pop()
        messages.append(message)
        weights.append(weight)
    return messages, weights, frozenset(ignored)


def _is_call(given: Mapping[str, Any]) -> bool:
    return str(given.get("role") or given.get("from")).strip().lower() in CALLS


def _are_one_turn(before: Mapping[str, Any], call: Mapping[str, Any]) -> bool:
    """Return whether a text and its calls were split: ShareGPT's roles allow no other way, but the turn is one."""
    shared = before.keys() & call.keys() - {"role", "content", "tool_calls"}
    return before["role"] == "assistant" and not shared


def _read_message(given: Mapping[str, Any], place: str) -> tuple[dict[str, Any], float]:
    # Parquet files hold null where a row lacks a key, and other tools write empty lists.
    message = {key: value for key, value in given.items() if value is not None and value != [] and value != {}}
    for other, own in (("from", "role"), ("value", "content")):
        if other in message and own not in message:
            message[own] = message.pop(other)
    message["role"] = _role(message, given, place)
    if _is_call(given):
        message["tool_calls"] = message.pop("content", None)
    call = message.pop("function_call", None)
    if call is not None:
        if message.get("tool_calls"):
            raise InputError(f"{place}: has both 'function_call' and 'tool_calls'. Keep one of them.")
        message["tool_calls"] = [call]
    if "tool_calls" in message:
        if message["role"] != "assistant":
            raise InputError(f"{place}: only an assistant message may have tool calls.")
        message["tool_calls"] = _calls(message["tool_calls"], place)
    message["content"] = _content(message, given, place)
    for key in REASONING:
        if not isinstance(message.get(key, ""), str):
            raise InputError(f"{place}: '{key}' must be text, not {describe_type(message, key)}.")
        if not message.get(key, "").strip():
            message.pop(key, None)
        elif message["role"] != "assistant":
            raise InputError(f"{place}: only an assistant message may have '{key}'.")
        else:
            encodable(message[key], f"'{key}'", place)
    return message, _weight(message, place)


def _role(message: Mapping[str, Any], given: Mapping[str, Any], place: str) -> str:
    role = message.get("role")
    if not isinstance(role, str):
        keys = ", ".join(repr(shorten(key)) for key in given)
        hint = f" It has {keys}: rename them to 'role' and 'content'." if given and "role" not in given else ""
        raise InputError(f"{place}: 'role' must be text, not {describe_type(given, 'role')}.{hint}")
    role = role.strip().lower()
    if role in CALLS:
        return "assistant"
    role = _OTHER_ROLES.get(role, role)
    if role not in ROLES:
        known = [*ROLES, *_OTHER_ROLES]
        hint = did_you_mean(role, known) or f" Known: {', '.join(known)}."
        raise InputError(f"{place}: unknown role '{shorten(role)}'.{hint}")
    return role


def _content(message: Mapping[str, Any], given: Mapping[str, Any], place: str) -> str:
    content = message.get("content")
    if content is None and given.get("content") == []:
        content = ""
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list):
        # Joined as vLLM and llama.cpp do for templates that take only text.
        content = "\n".join(_part(part, number, place) for number, part in enumerate(content, 1))
    if not isinstance(content, str):
        field = "value" if "value" in given and "content" not in given else "content"
        raise InputError(f"{place}: '{field}' must be text, not {describe_type(given, field)}.")
    return encodable(content, "its content", place)


def _part(part: Any, number: int, place: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise InputError(f"{place}: part {number} of 'content' must be text, not {type_name(part)}.")
    kind = part.get("type", "text")
    others = [key for key, value in part.items() if key not in ("type", "text") and value is not None]
    if kind not in ("text", "input_text", "output_text") or others:
        what = (
            f"of type '{shorten(str(kind))}'"
            if kind not in ("text", "input_text", "output_text")
            else f"has '{others[0]}'"
        )
        raise InputError(
            f"{place}: part {number} of 'content' {what.replace('of type', 'is of type')}: only text is read."
        )
    if not isinstance(part.get("text"), str):
        raise InputError(f"{place}: part {number} of 'content' has no text.")
    return str(part["text"])


def _weight(message: dict[str, Any], place: str) -> float:
    """Take the weight and the flags out of a message, and return its weight."""
    answer = message["role"] == "assistant"
    weight = read_weight(message, place)
    if not answer and weight not in (0, 1):
        raise InputError(f"{place}: only an assistant message may have a weight.")
    message.pop("weight", None)
    for key in FLAGS:
        flag = message.pop(key, None)
        if flag is None:
            continue
        if flag not in (True, False):
            raise InputError(f"{place}: '{key}' must be true or false, not {shorten(repr(flag))}.")
        if flag and not answer:
            raise InputError(
                f"{place}: '{key}' is true, but only an assistant message has a loss. "
                "Set data.loss_on: all to train on every message."
            )
        weight = weight if flag else 0.0
    return weight if answer else 0.0


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    calls = _parsed(value, "'tool_calls'", place)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise InputError(f"{place}: 'tool_calls' must be a list, not {type_name(calls)}.")
    return [_call(call, f"{place}: tool call {number}") for number, call in enumerate(calls, 1)]


def _call(call: Any, place: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise InputError(f"{place} must be an object with name and arguments.")
    call = {key: value for key, value in call.items() if value is not None}
    function = call.pop("function") if isinstance(call.get("function"), Mapping) else None
    if function is None:
        function = {key: call.pop(key) for key in ("name", "arguments", "parameters") if key in call}
    function = {key: value for key, value in function.items() if value is not None}
    if "parameters" in function and "arguments" not in function:
        function["arguments"] = function.pop("parameters")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise InputError(f"{place}: 'name' must be text, not {describe_type(function, 'name')}.")
    unknown = [key for key in (*call, *function) if key not in ("id", "type", "index", "name", "arguments")]
    if unknown or call.get("type", "function") != "function":
        what = f"'{shorten(unknown[0])}'" if unknown else f"type '{shorten(str(call['type']))}'"
        raise InputError(f"{place}: {what} is not supported: a call has id, type 'function', name and arguments.")
    arguments = _parsed(function.get("arguments"), "'arguments'", place)
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise InputError(f"{place}: 'arguments' must be an object, or its JSON, not {type_name(arguments)}.")
    encodable(json.dumps(arguments, ensure_ascii=False, default=str) + function["name"], "it", place)
    named = {"name": function["name"], "arguments": dict(arguments)}
    return {**{key: call[key] for key in ("id",) if key in call}, "type": "function", "function": named}


def _tools(row: Row, where: str) -> list[Any]:
    tools = _parsed(row.get("tools"), "field 'tools'", where) or []
    functions = _parsed(row.get("functions"), "field 'functions'", where) or []
    for name, value in (("tools", tools), ("functions", functions)):
        if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
            raise InputError(f"{where}: field '{name}' must be a list of objects, or its JSON.")
    if tools and functions:
        raise InputError(f"{where}: has both 'tools' and 'functions'. Keep one of them.")
    found = [_without_null(tool) for tool in tools or functions]
    found = [tool if "function" in tool else {"type": "function", "function": tool} for tool in found]
    for number, tool in enumerate(found, 1):
        if not isinstance(tool["function"], Mapping) or not isinstance(tool["function"].get("name"), str):
            raise InputError(f"{where}: tool {number} has no name.")
    return found


def _without_null(value: Any) -> Any:
    """Return a value without the nulls that Parquet puts where other rows have a key."""
    if isinstance(value, Mapping):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _parsed(value: Any, name: str, place: str) -> Any:
    """Return a value that other tools also store as JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except ValueError as error:
        raise InputError(f"{place}: {name} is not JSON: {shorten(value)}.") from error
