#!/usr/bin/env python3
"""Writes the first inputs of the fuzzer, and the words that it may use, from the OpenAPI document.

    stockade openapi | tests/fuzz/seeds.py CORPUS DICTIONARY

CORPUS gets a file for each operation: a request as its parameters and its body are described.
"""
import json
import pathlib
import sys

corpus, dictionary = map(pathlib.Path, sys.argv[1:])
corpus.mkdir(parents=True, exist_ok=True)
document = json.load(sys.stdin)
words = set()


def resolved(schema):
    while "$ref" in schema:
        place = document
        for step in schema["$ref"].split("/")[1:]:
            place = place[step]
        schema = place
    return schema


def sample(schema, depth=0):
    """A value that the schema describes, with every member there is."""
    schema = resolved(schema)
    for word in schema.get("enum", []):
        if isinstance(word, str):
            words.add(word)
    if "example" in schema:
        return schema["example"]
    if schema.get("examples"):
        return schema["examples"][0]
    for several in ("oneOf", "anyOf"):
        kinds = [kind for kind in schema.get(several, []) if kind.get("type") != "null"]
        if kinds:
            return [sample(kind, depth + 1) for kind in kinds][0]
    if "allOf" in schema:
        return {k: v for part in schema["allOf"] for k, v in sample(part, depth + 1).items()}
    kinds = schema.get("type", "object")
    kind = kinds if isinstance(kinds, str) else next(k for k in kinds if k != "null")
    if kind == "object":
        members = schema.get("properties", {})
        words.update(members)
        return {} if depth > 8 else {name: sample(member, depth + 1) for name, member in members.items()}
    if kind == "array":
        return [] if depth > 8 else [sample(schema["items"], depth + 1)]
    if "enum" in schema:
        return schema["enum"][0]
    formats = {
        "uuid": "00000000-0000-0000-0000-000000000000",
        "date-time": "2030-01-01T00:00:00Z",
        "email": "ada@example.org",
    }
    return {
        "string": formats.get(schema.get("format"), "a word of length"),
        "integer": schema.get("minimum", 1),
        "number": 1.5,
        "boolean": True,
    }.get(kind)


for path, item in document["paths"].items():
    for method, operation in item.items():
        if method not in ("get", "put", "post", "patch", "delete"):
            continue
        query, headers = [], []
        for parameter in map(resolved, item.get("parameters", []) + operation.get("parameters", [])):
            value = sample(parameter.get("schema", {}))
            if parameter["in"] == "query":
                words.add(parameter["name"] + "=")
                query.append(f"{parameter['name']}={value}")
            elif parameter["in"] == "header":
                words.add(parameter["name"] + ": ")
                headers.append(f"{parameter['name']}: {value}")
        bodies = [""]
        for media_type, content in resolved(operation.get("requestBody", {})).get("content", {}).items():
            headers.append(f"Content-Type: {media_type}")
            bodies = [json.dumps(sample(content.get("schema", {})))]
        line = "/".join("{id}" if step.startswith("{") else step for step in path.split("/"))
        line += "?" + "&".join(query) if query else ""
        for who in "012":
            request = "\n".join([f"{who}{method.upper()} {line.replace(' ', '+')}", *headers]) + "\n\n" + bodies[0]
            name = f"{method}{path}-{who}".replace("/", "_")
            (corpus / name).write_text(request)

dictionary.write_text("".join(
    '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"\n' for word in sorted(words) if word.isascii()
))
