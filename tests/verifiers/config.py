"""Holds configurations against the JSON Schema that `hooktrail schema config` prints.

usage: config.py SCHEMA.json CONFIG.toml...; prints a JSON object a line: {"file", "valid", "why"}
"""

import json
import pathlib
import sys
import tomllib

import jsonschema

schema = json.loads(pathlib.Path(sys.argv[1]).read_text())
jsonschema.Draft7Validator.check_schema(schema)
validator = jsonschema.Draft7Validator(schema)
for name in sys.argv[2:]:
    errors = [e.message for e in validator.iter_errors(tomllib.loads(pathlib.Path(name).read_text()))]
    print(json.dumps({"file": name, "valid": not errors, "why": errors}))
