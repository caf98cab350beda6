"""Verifies recorded requests with libraries that are not hooktrail's.

usage: verify.py REQUESTS.json; prints a JSON object a line: {"library", "version", "case", "verified"}
"""

import base64
import json
import sys
from importlib.metadata import version

import mailtrap.webhooks
import standardwebhooks
import svix

requests = json.load(open(sys.argv[1]))


def report(library, request, check):
    try:
        verified = check() is not False
    except (standardwebhooks.WebhookVerificationError, svix.WebhookVerificationError):
        verified = False
    print(json.dumps({"library": f"{library} (PyPI)", "version": version(library), "case": request["case"], "verified": verified}))


def is_json(body):
    try:
        return json.loads(body) is not None
    except ValueError:
        return False


for request in requests:
    body, headers, secret = base64.b64decode(request["body"]), request["headers"], request["secret"]
    if "webhook-signature" in headers:
        # It parses the body as one JSON document unless an option says that it is none.
        parse = is_json(body)
        report("standardwebhooks", request, lambda: standardwebhooks.Webhook(secret).verify(body, headers, json_parse=parse) and None)
        report("svix", request, lambda: svix.Webhook(secret).verify(body, headers))
    if "mailtrap-signature" in headers:
        report("mailtrap", request, lambda: mailtrap.webhooks.verify_signature(body, headers["mailtrap-signature"], secret))
