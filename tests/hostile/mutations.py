"""Hypothesis strategies for mutated recipes, rows and adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from budwood.untrusted.files import sha256

WORDS = ["", " ", "~nobody/x", "a\0b", "../..", "/dev/null", "/", "CON", "a\u202eb", "x" * 300, "x" * 5000, "hub/name"]
WORDS += ["1e999", "-1", "nan", "null", "[redacted]", "https://me:pw@host/x", "<|im_end|>", "\ud800", "{{ 1/0 }}", "é"]
NUMBERS = [0, -1, 1, 10**9, 2**63, 10**400, 0.1, -0.0, 1e308, float("inf"), float("-inf"), float("nan")]
KEYS = ["base", "model", "data", "train", "strategies", "lora", "rank", "output", "steps", "name", "options", "r", "$x"]

scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.integers(), st.text(max_size=12)
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def edited(draw: st.DrawFn, sound: Any, most: int = 3) -> Any:
    """A copy of plain values with a few entries replaced, removed or added anywhere."""
    result = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, most))):
        holder, key = None, None
        node = result
        while isinstance(node, dict | list) and node and (holder is None or draw(st.booleans())):
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            holder, node = node, node[key]
        if holder is None:
            break
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if kind == "replace":
            holder[key] = draw(values)
        elif kind == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from(KEYS) | st.text(max_size=5))] = draw(values)
        else:
            holder.append(draw(values))
    return result


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes of a file, truncated, partly overwritten, with insertions, or replaced."""
    kind = draw(st.sampled_from(["cut", "bytes", "insert", "other", "double"]))
    if kind == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if kind == "insert":
        at = draw(st.integers(0, len(data)))
        return data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
    if kind == "other":
        return draw(st.binary(max_size=64))
    if kind == "double":
        return data + data
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if result:
            result[draw(st.integers(0, len(result) - 1))] = draw(st.integers(0, 255))
    return bytes(result)


def dump(value: Any) -> bytes:
    """Return JSON, or nearly: lone surrogates, NaN and long numbers are written unchanged."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def read_safetensors(data: bytes) -> tuple[Any, bytes]:
    """Return the header and the tensor bytes of a valid file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_safetensors(header: Any, tensors: bytes) -> bytes:
    """Return a file with an arbitrary header."""
    text = dump(header)
    return len(text).to_bytes(8, "little") + text + tensors


@st.composite
def broken_file(draw: st.DrawFn, path: Path) -> bytes | None:
    """The mutated content of a file of an adapter; None: deleted."""
    data = path.read_bytes()
    kind = draw(st.sampled_from(["gone", "damaged", "edited", "edited", "edited"]))
    if kind == "gone":
        return None
    if kind == "damaged":
        return draw(damaged(data))
    if path.suffix == ".json":
        return dump(draw(edited(json.loads(data))))
    header, tensors = read_safetensors(data)
    return write_safetensors(draw(edited(header)), tensors)


def rehash(folder: Path) -> None:
    """Update the hashes in budwood.json to altered files, as a careful attacker would."""
    try:
        manifest = json.loads((folder / "budwood.json").read_bytes())
        manifest["files"] = {name: sha256(folder / name) for name in manifest["files"] if (folder / name).is_file()}
        (folder / "budwood.json").write_bytes(dump(manifest))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # the manifest itself was mutated
