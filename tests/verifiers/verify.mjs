// Verifies recorded requests with libraries that are not hooktrail's.
//
// usage: node verify.mjs REQUESTS.json; prints a JSON object a line: {"library", "version", "case", "verified"}

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// They are installed next to this run's target folder, not next to this file.
const load = createRequire(process.env.VERIFIERS + "/package.json");
const standard = load("standardwebhooks");
const svix = load("svix");
const mailtrap = load("mailtrap");
// It is a module, so it is loaded by the address of its file.
const octokit = await import(pathToFileURL(`${process.env.VERIFIERS}/node_modules/@octokit/webhooks-methods/dist-node/index.js`));

const version = (name) => JSON.parse(readFileSync(`${process.env.VERIFIERS}/node_modules/${name}/package.json`)).version;

function report(library, request, check) {
  let verified = true;
  try {
    verified = check() !== false;
  } catch (e) {
    if (!(e instanceof standard.WebhookVerificationError || e instanceof svix.WebhookVerificationError)) throw e;
    verified = false;
  }
  console.log(JSON.stringify({ library: `${library} (npm)`, version: version(library), case: request.case, verified }));
}

function isJson(bytes) {
  try {
    JSON.parse(bytes);
    return true;
  } catch {
    return false;
  }
}

for (const request of JSON.parse(readFileSync(process.argv[2]))) {
  const body = Buffer.from(request.body, "base64");
  const { headers, secret } = request;
  if (headers["webhook-signature"]) {
    // Both parse the body as one JSON document unless an option says that it is none.
    const options = { jsonParse: isJson(body) };
    report("standardwebhooks", request, () => new standard.Webhook(secret).verify(body, headers, options) && null);
    if (options.jsonParse) report("svix", request, () => new svix.Webhook(secret).verify(body, headers) && null);
  }
  if (headers["mailtrap-signature"]) {
    report("mailtrap", request, () => mailtrap.verifyWebhookSignature(body, headers["mailtrap-signature"], secret));
  }
  if (headers["x-hub-signature-256"]?.startsWith("sha256=")) {
    const verified = await octokit.verify(secret, body.toString(), headers["x-hub-signature-256"]);
    report("@octokit/webhooks-methods", request, () => verified);
  }
}
