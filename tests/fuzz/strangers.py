"""Untrusted documents: any JSON, a good document with something changed in it, and bytes that are hardly JSON."""

import copy
import json
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from numprune.errors import NumpruneError

# The same in every run, so that a failure is one for everybody; NUMPRUNE_FUZZ=5000 looks for more, elsewhere each time.
fuzz = settings(
    max_examples=int(os.environ.get("NUMPRUNE_FUZZ", "40")),
    deadline=None,
    derandomize="NUMPRUNE_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)

NAMES = [
    "../x",
    "/etc/passwd",
    "a/../../x",
    "a//b",
    "./a",
    ".",
    "..",
    "",
    "a\0b",
    "a\\..\\x",
    "C:\\x",
    "é",
    "e\u0301",
    "A",
    "a",
    "\u202e",
    "\ud800",
    "a/" * 1500,
    "x" * 300,
    "~root/x",
    "~nobody-of-that-name/x",
    "a\nb",
    "manifest.json",
    "con",
    "%2e%2e/x",
]
ODD: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1e308, 1e-320, -0.5, [], {}, [[]], "", *NAMES]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(NAMES)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)

# Bytes that a parser must get over: truncated, nested, huge, doubled.
RAW = {
    "empty": b"",
    "NUL": b"\0",
    "no UTF-8": b"\xff\xfe",
    "cut off": b"{",
    "lists in lists": b"[" * 100_000,
    "objects in objects": b'{"a":' * 100_000,
    "deep and whole": b"[" * 900 + b"]" * 900,
    "a million digits": b"1" * 1_000_000,
    "twice the same": b'{"a": 1, "a": 2}',
    "NaN": b'{"a": NaN}',
    "1e999": b'{"a": 1e999}',
    "-Infinity": b'{"a": -Infinity}',
    "half a pair": b'"\\ud800"',
    "half a pair for a key": b'{"\\ud800": 1}',
    "BOM": "\ufeff{}".encode(),
    "null": b"null",
    "a list": b"[]",
    "an object": b"{}",
}
raw = st.sampled_from(list(RAW)).map(RAW.__getitem__) | st.binary(max_size=40)


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """`document` with up to three places replaced, removed, added to or doubled."""
    result = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        node = result
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3)):
                node = node[key]
                continue
            match draw(st.sampled_from(["replace", "replace", "odd", "odd", "remove", "add"])):
                case "replace":
                    node[key] = draw(values)
                case "odd":
                    node[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
                case "remove":
                    del node[key]
                case "add" if isinstance(node, dict):
                    node[draw(st.sampled_from(NAMES) | st.text(max_size=6))] = copy.deepcopy(node[key])
                case _:
                    node.append(copy.deepcopy(node[key]))
            break
    return result


def written(document: Any) -> bytes:
    """As JSON that says what Python would let it say, NaN and lone surrogates included."""
    return json.dumps(document).encode()


def documents(good: Any) -> st.SearchStrategy[bytes]:
    """Something that claims to be such a document."""
    return st.one_of(changed(good).map(written), changed(good).map(written), values.map(written), raw)


def named(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the function returns, or the error with a name that it raises: nothing else may come of a stranger's."""
    try:
        return function(*args, **kwargs)
    except NumpruneError as error:
        told = str(error)
        assert told
        assert len(told) < 20_000
        return error
