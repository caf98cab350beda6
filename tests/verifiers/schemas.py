"""Holds recorded requests against docs/schema and docs/openapi.yaml.

usage: schemas.py DOCS REQUESTS.json; prints a JSON object a line: {"case", "valid", "why"}
"""

import base64
import json
import pathlib
import re
import sys

import jsonschema
import openapi_spec_validator
import referencing
import yaml

docs = pathlib.Path(sys.argv[1])
requests = json.load(open(sys.argv[2]))
schemas = {name: json.loads((docs / "schema" / name).read_text()) for name in ("event.json", "payload.json")}
for schema in schemas.values():
    jsonschema.Draft202012Validator.check_schema(schema)
registry = referencing.Registry().with_resources((n, referencing.Resource.from_contents(s)) for n, s in schemas.items())
validators = {n: jsonschema.Draft202012Validator(s, registry=registry) for n, s in schemas.items()}

api = yaml.safe_load((docs / "openapi.yaml").read_text())
openapi_spec_validator.validate(api, base_uri=(docs / "openapi.yaml").resolve().as_uri())
operation = api["webhooks"]["batch"]["post"]
parameters = {p["name"]: p for p in operation["parameters"]}


def objects(text):
    """The objects of a body of `splunk_hec`, which follow each other without a separator."""
    found, at = [], 0
    while at < len(text):
        one, at = json.JSONDecoder().raw_decode(text, at)
        found.append(one)
    return found


def wrong(request):
    """What a request has that the documents do not allow, or lacks."""
    headers, body = request["headers"], base64.b64decode(request["body"])
    for name, parameter in parameters.items():
        if name in headers and not re.search(parameter["schema"]["pattern"], headers[name]):
            yield f"header {name}: {headers[name]}"
        if name not in headers and parameter["required"]:
            yield f"no header {name}"
    for name in headers:
        if name not in parameters and name not in ("content-type", "content-length", "host", "accept"):
            yield f"header {name} is not described"
    if headers["content-type"] not in operation["requestBody"]["content"]:
        yield f"content-type {headers['content-type']}"
    if headers["content-type"] == "application/json":
        try:
            parsed = json.loads(body)
        except json.JSONDecodeError:
            parsed = objects(body.decode())
        array = parsed if isinstance(parsed, list) else [parsed]
        schema = "payload.json" if "events" in parsed else "event.json"
        for one in array:
            hec = isinstance(one.get("event"), dict)
            yield from (e.message for e in validators[schema].iter_errors(one["event"] if hec else one))
    elif headers["content-type"] == "application/cloudevents-batch+json":
        for one in json.loads(body):
            yield from (e.message for e in validators["event.json"].iter_errors(one["data"]))
    elif headers["content-type"] == "application/jsonl":
        for line in body.decode().removesuffix("\n").split("\n"):
            yield from (e.message for e in validators["event.json"].iter_errors(json.loads(line)))


for request in requests:
    why = list(wrong(request))
    print(json.dumps({"case": request["case"], "valid": not why, "why": why}))
