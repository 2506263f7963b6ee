"""JSON texts with one or two things wrong, as a broken download or somebody with intent would have them.

Not every result is wrong: a folder may well survive what is done to it.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

DEEP = 50_000
# what Python's writer would not write; each stands in a text for a value that is put in afterwards
_RAW = {
    "@nan@": "NaN",
    "@infinity@": "-Infinity",
    "@beyond@": "1e999",
    "@digits@": "9" * 5000,
    "@deep-list@": "[" * DEEP + "]" * DEEP,
    "@deep-object@": '{"a":' * DEEP + "1" + "}" * DEEP,
    "@half@": '"\\ud800"',
    "@open@": "[1, 2",
    "@comment@": "1 // one",
}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 512, 4096, 2**31, 2**32, 2**53, 2**63, -(2**63), 10**60, 0.5, -0.0, 1e-320),
    *(1e308, "", "5", "0", "\0", "a" * 5000, "../../etc/passwd", "\u202egpj", [], {}, [[]], [None], [1, "1"], [0, 0]),
    *([2**63, 2**63], [-1], {"content": 5}, {"a": {"b": {"c": None}}}, [1] * 3000, ["x"] * 300, *_RAW),
)


def text_of(value: Any) -> bytes:
    """The JSON text of a value, with what stands for other things replaced by them."""
    text = json.dumps(value)
    for mark, raw in _RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text.encode()


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value inside; of long lists and objects only the first and the last few."""
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    if len(inner) > 24:
        inner = inner[:16] + inner[-8:]
    return [place for key, item in inner for place in ((*at, key), *places(item, (*at, key)))]


def inside(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def changed(random: Random, value: Any) -> Any:
    """The value with one place changed: another value, a near number, gone, renamed, or what another place has."""
    ways = places(value)
    if not ways or random.random() < 0.04:
        return random.choice(VALUES)
    *way, key = random.choice(ways)
    home = inside(value, tuple(way))
    old, what = home[key], random.random()
    if type(old) is int and what < 0.35:
        home[key] = random.choice((old + 1, old - 1, -old, 2 * old, old // 2, old * 10**6, str(old), float(old), [old]))
    elif what < 0.7:
        home[key] = random.choice(VALUES)
    elif what < 0.8:
        del home[key]
    elif what < 0.9:
        home[key] = inside(value, random.choice(ways[:40]))
    elif isinstance(home, dict):
        home[random.choice((key + "x", key.upper(), "", "a.b", "\u0007", "@half@"))] = home.pop(key)
    else:
        home.append(random.choice(VALUES))
    return value


def odd_text(random: Random, text: bytes) -> bytes:
    """The bytes with something wrong that is no matter of values."""
    what = random.randrange(10)
    if what == 0:
        return text[: random.randrange(len(text) + 1)]
    if what == 1:
        at = random.randrange(len(text))
        return text[:at] + bytes([random.randrange(256)]) + text[at + 1 :]
    if what == 2:
        return b"\xef\xbb\xbf" + text
    if what == 3:
        return text.decode("utf-8", "replace").encode("utf-16")
    if what == 4:
        return b""
    if what == 5:
        return text + text
    if what == 6:  # the first key once more
        key = text[1:].split(b":", 1)[0]
        return b"{" + key + b": 1, " + text[1:] if key.strip().startswith(b'"') else b"{}"
    if what == 7:
        return bytes(random.randrange(256) for _ in range(random.randrange(1, 500)))
    if what == 8:
        return b"[" * random.choice((100, 10**5, 10**6))
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def odd_json(random: Random, text: bytes) -> bytes:
    """A JSON text with something wrong."""
    if random.random() < 0.2:
        return odd_text(random, text)
    value = json.loads(text)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        try:
            value = changed(random, value)
        except (TypeError, IndexError, KeyError, AttributeError):  # an earlier change took the place away
            break
    return text_of(value)
