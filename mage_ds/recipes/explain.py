"""What is wrong with a recipe, as one line: where, key, value, what is allowed, the nearest right key."""

import difflib
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import ValidationError


def explain(error: ValidationError, recipe: type, data: dict, file: str, overrides: Sequence[str]) -> str:
    """The first finding, and the number of other keys that are wrong.

    Args: recipe: the class that refused `data`, which was read from `file` and changed by `overrides`.
    """
    schema = recipe.model_json_schema()
    found = [(_locate(problem["loc"], schema, data), problem) for problem in error.errors()]
    (key, node, value), problem = found[0]
    if problem["type"] == "value_error":
        message = f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
    elif problem["type"] == "extra_forbidden":
        message = f"{key}: there is no such key{_nearest(key, schema)}"
    elif problem["type"] == "missing":
        message = f"{key} is missing: it must be {_allowed(node)}"
    else:
        shown = yaml.safe_dump(value, default_flow_style=True, width=10**6).splitlines()[0]
        message = f"{key} = {shown}: must be {_allowed(node)}"
    others = len({where[0] for where, _ in found}) - 1
    return f"{_source(key, file, overrides)}: {message}" + (f" (and {others} more)" if others else "")


def _source(key: str, file: str, overrides: Sequence[str]) -> str:
    """Who gave the value of `key`; an empty key stands for values that do not agree with each other."""
    if not key:
        return " ".join([file, *overrides])
    given = [override.partition("=")[0] + "." for override in overrides]
    inside = any(k.startswith(f"{key}.") or f"{key}.".startswith(k) for k in given)
    return "command line" if inside else file


def _locate(loc: tuple, schema: dict, data: Any) -> tuple[str, dict, Any]:
    """Dotted key, JSON schema and value of pydantic's location, without list indices and union branches."""
    node, keys = schema, []
    for part in loc:
        properties = _follow(node, schema).get("properties", {})
        known = part in properties
        if not known and not (isinstance(data, dict) and part in data):
            break
        keys.append(str(part))
        node, data = properties.get(part, {}), data.get(part) if isinstance(data, dict) else None
        if not known:
            break
    return ".".join(keys), _follow(node, schema), data


def _follow(node: dict, schema: dict) -> dict:
    """The node behind a reference; of a section that may be null the section's, with `or null` in its words."""
    if "$ref" in node:
        return schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    sections = [branch for branch in node.get("anyOf", []) if "$ref" in branch]
    if len(sections) == 1:
        return {**_follow(sections[0], schema), "optional": True}
    return node


def _leaf_keys(node: dict, schema: dict, prefix: str = "") -> list[str]:
    keys = []
    for name, child in node.get("properties", {}).items():
        keys.append(prefix + name)
        keys += _leaf_keys(_follow(child, schema), schema, f"{prefix}{name}.")
    return keys


def _nearest(key: str, schema: dict) -> str:
    known = _leaf_keys(schema, schema)
    last = key.rsplit(".", 1)[-1]
    lasts = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    if last in lasts:  # the right name in the wrong section
        return f"; did you mean {lasts[last]}?"
    siblings = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
    close = difflib.get_close_matches(key, siblings, 1) or difflib.get_close_matches(key, known, 1)
    if not close:
        close = [lasts[name] for name in difflib.get_close_matches(last, lasts, 1)]
    if close:
        return f"; did you mean {close[0]}?"
    return f"; the keys are {', '.join(siblings or schema['properties'])}"


def _allowed(node: dict) -> str:
    """A JSON schema in words."""
    if "anyOf" in node:
        optional = "default" in node  # then null only means: not given
        branches = [branch for branch in node["anyOf"] if not (optional and branch.get("type") == "null")]
        return " or ".join(_allowed(branch) for branch in branches)
    if "const" in node or "enum" in node:
        values = node.get("enum") or [node["const"]]
        return f"one of {', '.join(map(str, values))}" if len(values) > 1 else str(values[0])
    kind = node.get("type")
    if kind == "array":
        count = node.get("minItems") if node.get("minItems") == node.get("maxItems") else None
        return f"a list of {count or 'one or more'}, each {_allowed(node['items'])}"
    if kind == "object":
        null = " or null" if node.get("optional") else ""
        return f"a section with the keys {', '.join(node.get('properties', {}))}{null}"
    names = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
    limits = {
        "exclusiveMinimum": "above {:g}",
        "minimum": "at least {:g}",
        "exclusiveMaximum": "below {:g}",
        "maximum": "at most {:g}",
        "multipleOf": "a multiple of {:g}",
    }
    bounds = [text.format(node[name]) for name, text in limits.items() if name in node]
    return " ".join([names.get(kind, "a text"), " and ".join(bounds)]).strip()
