"""`response_format` and JSON schemas: what the engine's grammar enforces passes, anything else is refused by name.

The engine ignores keywords it does not know and takes a pattern it cannot express as "any string". A schema that is
only half enforced looks enforced, so it is an error here. Source: llama.cpp common/json-schema.cpp at the pin.
Annotations pass, and so does an unknown `format` (JSON Schema: an annotation). `oneOf` is enforced as `anyOf`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pyllamaernie.errors import InputError, SchemaError

ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
    *("$schema", "$id", "$anchor", "$comment", "$defs", "definitions", "contentMediaType", "contentEncoding"),
}
KEYWORDS = {
    "object": {"properties", "required", "additionalProperties", "allOf"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"pattern", "format", "minLength", "maxLength", "allOf"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": set(),
    "boolean": set(),
    "null": set(),
}
FORMAT_TYPES = ("text", "json_object", "json_schema")


def response_format(given: Any) -> dict[str, Any] | None:
    """The engine's form of a response format; None for plain text. Raises: InputError, SchemaError."""
    if given is None:
        return None
    if not isinstance(given, Mapping) or given.get("type") not in FORMAT_TYPES:
        raise InputError(f'response_format is {{"type": one of {", ".join(FORMAT_TYPES)}, ...}}, got {given!r}')
    kind = given["type"]
    if kind == "text":
        return None
    if kind == "json_object":
        if "schema" not in given:
            return {"type": "json_object"}
        schema, where = given["schema"], "response_format.schema"
    elif "json_schema" in given:
        wrapper = given["json_schema"]
        if not isinstance(wrapper, Mapping) or "schema" not in wrapper:
            raise SchemaError('response_format.json_schema holds no "schema"')
        schema, where = wrapper["schema"], "response_format.json_schema.schema"
    elif "schema" in given:  # the form of the Responses route
        schema, where = given["schema"], "response_format.schema"
    else:
        raise SchemaError('response_format of type json_schema holds no "json_schema" with a "schema"')
    check_schema(schema, where)
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def check_schema(schema: Any, where: str) -> None:
    """Raise SchemaError, naming the place and the keyword, unless the engine enforces all of the schema."""
    if not isinstance(schema, Mapping):
        raise SchemaError(f"{where} is not a JSON schema (an object), got {schema!r}")
    for name in ("$defs", "definitions"):
        for key, child in _children(schema, name, where):
            check_schema(child, f"{where}.{name}.{key}")
    given = {key for key in schema if key not in ANNOTATIONS and not str(key).startswith("x-")}
    if "$ref" in given:
        _only(given, {"$ref"}, "beside $ref", where)
        return
    for name in ("anyOf", "oneOf"):
        if name in given:
            _only(given, {name}, f"beside {name}", where)
            _alternatives(schema, name, where)
            return
    for name in ("const", "enum"):
        if name in given:
            _only(given, {name, "type"}, f"beside {name}", where)
            return
    types = schema.get("type")
    if types is None:
        types = [next((kind for kind, words in KEYWORDS.items() if given & words), None)]
        if types == [None]:
            _only(given, set(), "in a schema without a type", where)
            return
    for kind in types if isinstance(types, list) else [types]:
        if kind not in KEYWORDS:
            raise SchemaError(f"{where}: unknown type {kind!r}; allowed: {', '.join(KEYWORDS)}")
    allowed = set().union(*(KEYWORDS[kind] for kind in (types if isinstance(types, list) else [types])))
    _only(given, allowed | {"type"}, f"for the type {types if isinstance(types, str) else ' or '.join(types)}", where)
    _check_parts(schema, given, where)


def _check_parts(schema: Mapping[str, Any], given: set[str], where: str) -> None:
    if "allOf" in given:
        _only(given, {"allOf", "type"}, "beside allOf", where)
        _alternatives(schema, "allOf", where)
    properties = dict(_children(schema, "properties", where))
    for key, child in properties.items():
        check_schema(child, f"{where}.properties.{key}")
    missing = [name for name in schema.get("required", ()) if name not in properties]
    if missing:
        raise SchemaError(f"{where}: {missing[0]!r} is required but is none of the properties")
    if isinstance(schema.get("additionalProperties"), Mapping):
        check_schema(schema["additionalProperties"], f"{where}.additionalProperties")
    if {"items", "prefixItems"} <= given:
        raise SchemaError(f"{where}: items beside prefixItems cannot be enforced")
    for name in ("items", "prefixItems"):
        if isinstance(schema.get(name), list):
            _only(given, {name, "type"}, f"beside a list of {name}", where)
            for index, child in enumerate(schema[name]):
                check_schema(child, f"{where}.{name}[{index}]")
        elif name in given:
            check_schema(schema[name], f"{where}.{name}")
    for low, strict in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if {low, strict} <= given:
            raise SchemaError(f"{where}: {strict} beside {low} cannot be enforced")
    if str(schema.get("format")).startswith(("date", "time", "uuid")):
        _only(given, {"format", "type"}, f"beside format {schema['format']!r}", where)
    if "pattern" in given:
        _only(given, {"pattern", "type"}, "beside pattern", where)
        _check_pattern(schema["pattern"], where)


def _check_pattern(pattern: Any, where: str) -> None:
    if not isinstance(pattern, str):
        raise SchemaError(f"{where}: pattern is a string, got {pattern!r}")
    reason = ""
    if len(pattern) < 2 or pattern[0] != "^" or pattern[-1] != "$" or pattern.endswith("\\$"):
        reason = "it must begin with ^ and end with $"
    elif re.search(r"\(\?(?!:)", pattern):
        reason = "only plain groups and (?:...) are known"
    elif found := re.search(r"\\[A-Za-z0-9]", re.sub(r"\\[nrtxuU]", "", pattern)):
        reason = f"{found[0]} is not known; write a class such as [0-9]"
    elif re.search(r"[*+?}][?+]", pattern):
        reason = "lazy and possessive repetition are not known"
    if reason:
        raise SchemaError(f"{where}: pattern {pattern!r} cannot be enforced: {reason}")


def _alternatives(schema: Mapping[str, Any], name: str, where: str) -> None:
    children = schema[name]
    if not isinstance(children, list) or not children:
        raise SchemaError(f"{where}.{name} is a list of schemas that is not empty, got {children!r}")
    for index, child in enumerate(children):
        check_schema(child, f"{where}.{name}[{index}]")


def _children(schema: Mapping[str, Any], name: str, where: str) -> list[tuple[str, Any]]:
    children = schema.get(name, {})
    if not isinstance(children, Mapping):
        raise SchemaError(f"{where}.{name} is an object of schemas, got {children!r}")
    return list(children.items())


def _only(given: set[str], allowed: set[str], place: str, where: str) -> None:
    extra = sorted(given - allowed)
    if extra:
        raise SchemaError(f"{where}: {extra[0]!r} cannot be enforced {place}")
