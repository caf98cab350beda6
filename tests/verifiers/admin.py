"""Holds recorded exchanges with the admin listener against docs/admin.yaml.

usage: admin.py DOCS EXCHANGES.json; prints a JSON object a line: {"case", "valid", "why"}, and last {"missed": [...]}, the
documented operations and statuses that no exchange was about
"""

import json
import pathlib
import re
import sys

import jsonschema
import openapi_spec_validator
import referencing
import referencing.jsonschema
import yaml

docs = pathlib.Path(sys.argv[1])
exchanges = json.load(open(sys.argv[2]))
api = yaml.safe_load((docs / "admin.yaml").read_text())
openapi_spec_validator.validate(api, base_uri=(docs / "admin.yaml").resolve().as_uri())
resource = referencing.Resource.from_contents(api, default_specification=referencing.jsonschema.DRAFT202012)
registry = referencing.Registry().with_resource("", resource)
for name in ("event.json", "payload.json"):
    contents = json.loads((docs / "schema" / name).read_text())
    registry = registry.with_resource(f"schema/{name}", referencing.Resource.from_contents(contents))
seen = set()


def resolved(value):
    while "$ref" in value:
        found = api
        for part in value["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        value = found
    return value


def wrong(exchange):
    """What an exchange has that the document does not allow."""
    path = exchange["path"].partition("?")[0]
    # A path without a parameter comes before one with it: https://spec.openapis.org/oas/v3.1.1#paths-object
    for pattern, item in sorted(api["paths"].items(), key=lambda entry: entry[0].count("{")):
        if re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(pattern)), path):
            break
    else:
        yield f"{path} is not described"
        return
    method = exchange["method"].lower()
    if method not in item:
        if exchange["status"] != 405:
            yield f"{method} {pattern} is not described and was answered {exchange['status']}"
        return
    responses = item[method]["responses"]
    status = str(exchange["status"])
    if status not in responses:
        yield f"{method} {pattern}: {status} is not described"
        return
    seen.add((method, pattern, status))
    content = resolved(responses[status])["content"]
    media = exchange["content_type"].partition(";")[0]
    if media not in content:
        yield f"{method} {pattern}: {status} is {media}"
        return
    body = json.loads(exchange["text"]) if media.endswith("json") else exchange["text"]
    schema = content[media]["schema"]
    validator = jsonschema.Draft202012Validator(schema, registry=registry, _resolver=registry.resolver(""))
    yield from (f"{e.json_path}: {e.message}" for e in validator.iter_errors(body))


for exchange in exchanges:
    why = list(wrong(exchange))
    print(json.dumps({"case": f"{exchange['method']} {exchange['path']}", "valid": not why, "why": why}))
described = {
    (method, path, status)
    for path, item in api["paths"].items()
    for method in ("get", "post")
    if method in item
    for status in item[method]["responses"]
}
print(json.dumps({"missed": sorted(" ".join(d) for d in described - seen)}))
