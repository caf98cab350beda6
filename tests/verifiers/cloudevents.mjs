// Reads recorded requests with the CloudEvents SDK of the CNCF.
//
// usage: node cloudevents.mjs REQUESTS.json; prints a JSON object a line: {"case", "valid", "why", "types"}

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const { HTTP } = createRequire(process.env.VERIFIERS + "/package.json")("cloudevents");

for (const { case: name, headers, body } of JSON.parse(readFileSync(process.argv[2]))) {
  let found;
  try {
    const events = HTTP.toEvent({ headers, body: Buffer.from(body, "base64").toString() });
    if (!Array.isArray(events)) throw new Error("it is no batch");
    // Strict: it throws at what version 1.0 does not allow.
    for (const event of events) event.validate();
    const apart = new Set(events.map((event) => `${event.source} ${event.id}`));
    if (apart.size !== events.length) throw new Error("two events have one id");
    const wrong = events.find((event) => event.type !== event.data.event);
    if (wrong) throw new Error(`the type ${wrong.type} is not that of its data`);
    found = { valid: true, types: events.map((event) => event.type) };
  } catch (e) {
    found = { valid: false, why: e.message };
  }
  console.log(JSON.stringify({ case: name, ...found }));
}
