// What most teams write first: a queue of RabbitMQ to a webhook, in batches, signed. It checks no event, keeps no failure and
// retries nothing; any answer but 200 ends it. benches/delivery.rs measures it next to hooktrail.
//
// usage: VERIFIERS=FOLDER node deliver.mjs AMQP-URL QUEUE URL SECRET BATCH CONCURRENCY

import { createHmac, randomUUID } from "node:crypto";
import { createRequire } from "node:module";

const load = createRequire(process.env.VERIFIERS + "/package.json");
const [amqp, { Pool }] = [load("amqplib"), load("undici")];
const [broker, queue, receiver, secret, max, concurrency] = process.argv.slice(2);

const { origin, pathname } = new URL(receiver);
const http = new Pool(origin, { connections: Number(concurrency), pipelining: 1 });
const channel = await (await amqp.connect(broker)).createChannel();
await channel.prefetch(2000);

let batch = [];
const waiting = [];
const sent = []; // in the order of their events: an ack is for all before it
let sending = 0;

function next() {
  while (sending < concurrency && waiting.length > 0) send(waiting.shift());
}

async function send(messages) {
  sending += 1;
  const entry = { done: false, last: messages.at(-1) };
  sent.push(entry);
  const body = Buffer.from(`{"events":[${messages.map((message) => message.content.toString()).join(",")}]}`);
  const [id, timestamp] = [randomUUID(), Math.floor(Date.now() / 1000)];
  const signature = createHmac("sha256", secret).update(`${id}.${timestamp}.`).update(body).digest("base64");
  const headers = {
    "content-type": "application/json",
    "webhook-id": id,
    "webhook-timestamp": String(timestamp),
    "webhook-signature": `v1,${signature}`,
  };
  const answer = await http.request({ method: "POST", path: pathname, headers, body });
  await answer.body.dump();
  if (answer.statusCode !== 200) throw new Error(`the receiver answered ${answer.statusCode}`);
  entry.done = true;
  let last;
  while (sent[0]?.done) last = sent.shift().last;
  if (last) channel.ack(last, true);
  sending -= 1;
  next();
}

let timer;
function flush() {
  clearTimeout(timer);
  timer = undefined;
  waiting.push(batch);
  batch = [];
  next();
}

await channel.consume(queue, (message) => {
  batch.push(message);
  if (batch.length >= max) flush();
  else timer ??= setTimeout(flush, 1000);
});
