// What strangers wrote is shown, and does nothing, on each page where it can stand.

import assert from 'node:assert/strict';
import { createServer } from 'node:http';
import { Visitor, api, ask, given, play, step, until } from './lib.mjs';
import { bundles, cut, long, payloads } from './payloads.mjs';

/** All elements that the console has, and the attributes that one of them may have. */
const ELEMENTS = `html head meta title link script body a header div svg rect line circle path text g nav ul ol li form input button
  span main section h1 h2 h3 p strong code pre dl dt dd table thead tbody tr th td label select option textarea details summary time
  fieldset legend bdi`.split(/\s+/);
const ATTRIBUTES = /^(aria-[a-z]+|data-(copy|live|preview|previews|refresh)|accept|action|autocomplete|autofocus|charset|checked|class|colspan|content|cx|cy|d|datetime|disabled|download|fill(-[a-z]+)?|font-size|for|form|formaction|height|hidden|href|id|lang|maxlength|method|name|open|placeholder|preserveaspectratio|readonly|rel|required|r|role|rows|rx|scope|selected|spellcheck|src|stroke(-[a-z]+)?|tabindex|text-anchor|title|type|value|viewbox|width|x|x1|x2|xmlns|y|y1|y2)$/;

/** What a page has that it may not have; runs in the page. */
function wrong({ elements, attributes, origin }) {
  const found = [];
  const allowed = new RegExp(attributes);
  const counts = { title: 0, script: 0, main: 0, h1: 0, body: 0 };
  for (const element of document.querySelectorAll('*')) {
    const name = element.localName;
    if (name in counts && !(name === 'title' && element.namespaceURI.endsWith('svg'))) counts[name] += 1;
    if (!elements.includes(name)) found.push(element.outerHTML.slice(0, 200));
    for (const { name: attribute, value } of element.attributes) {
      if (!allowed.test(attribute.toLowerCase())) found.push(`${attribute} of ${element.outerHTML.slice(0, 200)}`);
      if (['href', 'src', 'action', 'formaction'].includes(attribute)) {
        const url = new URL(value, document.baseURI);
        if (url.origin !== origin || !url.pathname.startsWith('/console')) found.push(`leads to ${value.slice(0, 200)}`);
      }
    }
  }
  for (const [name, count] of Object.entries(counts)) if (count !== 1) found.push(`${count} times ${name}`);
  const frame = [...document.body.children].map((element) => element.className || element.localName).join(' ');
  if (!['skip bar main', 'skip main'].includes(frame)) found.push(`its parts are '${frame}'`);
  if (document.body.querySelectorAll('form form, a a, button button').length > 0) found.push('one in another');
  const hidden = /[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/;
  const texts = [document.title];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const { data, parentNode } = walker.currentNode;
    if (parentNode.localName !== 'textarea') texts.push(data);
    if (!['textarea', 'pre'].includes(parentNode.localName) && data.length > 40_000) found.push(`a ${parentNode.localName} of ${data.length} letters`);
  }
  for (const element of document.querySelectorAll('[aria-label], [title]')) texts.push(element.title, element.getAttribute('aria-label') ?? '');
  for (const text of texts) if (hidden.test(text)) found.push(`hidden letters in ${JSON.stringify(text.slice(0, 200))}`);
  if (document.scrollingElement.scrollWidth > document.scrollingElement.clientWidth) found.push(`it is ${document.scrollingElement.scrollWidth} wide`);
  return found;
}

/** What was found on all pages: they are told together. */
const mistakes = [];

async function check(visitor, what) {
  const given = { elements: ELEMENTS, attributes: ATTRIBUTES.source, origin: visitor.origin };
  const found = await visitor.page.evaluate(wrong, given);
  mistakes.push(...found.map((text) => `${what}: ${visitor.page.url().slice(0, 200)}: ${text}`));
}

/** Loads a page, whatever its status, and checks it. */
async function look(visitor, path, statuses = [200]) {
  const answer = await visitor.page.goto(visitor.origin + path);
  assert.ok(statuses.includes(answer.status()), `${answer.status()}: ${path.slice(0, 300)}`);
  await check(visitor, path.slice(0, 100));
}

/** The pages that the rows of a list lead to, by the first link of each: so many. On a slow machine a page may end before the list does. */
async function rows(visitor, path, region, count, hasText = '') {
  const found = [];
  for (let next = path; next !== null; ) {
    await look(visitor, next);
    const rows = visitor.page.getByRole('region', { name: region, exact: true }).locator('tbody tr').filter({ hasText });
    found.push(...(await rows.evaluateAll((all) => all.map((row) => row.querySelector('a').getAttribute('href')))));
    const older = visitor.page.locator('.pager a[rel=next]');
    next = (await older.count()) > 0 ? await older.first().getAttribute('href') : null;
  }
  assert.equal(found.length, count, `rows of ${path}`);
  return found;
}

/** A page that does everything that no page may do: each is noted, or this script proves nothing. */
async function prove(browser) {
  const visitor = await Visitor.arrive(browser);
  const page = (policy, body) => visitor.context.route('**/console/proof', (route) =>
    route.fulfill({ headers: { 'content-type': 'text/html', ...(policy && { 'content-security-policy': policy }) }, body: `<!doctype html>${body}` }));
  await page('', `<script>alert(1); console.error('odd'); fetch('//other.example/').catch(() => {}); open('about:blank'); throw 1</script><b onclick=x>b</b>`);
  await visitor.page.goto(`${given.origin}/console/proof`);
  const kinds = (visitor) => new Set(visitor.faults.map(({ kind }) => kind));
  await until('all are noted', () => ['dialog', 'console', 'error', 'request'].every((kind) => kinds(visitor).has(kind)));
  await check(visitor, 'the proof');
  assert.match(mistakes.join(), /onclick/);
  mistakes.length = 0;
  visitor.faults.length = 0;
  await page("default-src 'none'", '<p style="color:red">red</p><script>alert(1)</script>');
  await visitor.page.goto(`${given.origin}/console/proof`);
  await until('the policy is noted', () => kinds(visitor).has('policy'));
  assert.ok(!kinds(visitor).has('dialog'));
  await visitor.vanish();
}

/** Each alone is in all lists. Those in bundles, and the long ones, have pages of their own. */
const whole = [...bundles(240), ...long];
const texts = [...payloads, ...whole];

/** A receiver that answers an event with the text that the event has. */
async function hostileReceiver() {
  const server = createServer((request, answer) => {
    let body = '';
    request.on('data', (part) => { body += part; });
    request.on('end', () => {
      const text = texts[JSON.parse(body).events[0].n] ?? '';
      answer.writeHead(500, { 'content-type': 'text/html' });
      answer.end(text);
    });
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  return { url: `http://127.0.0.1:${server.address().port}/in`, close: () => server.closeAllConnections() || server.close() };
}

await play(async (browser) => {
  step('what may not be is seen');
  await prove(browser);

  step('events, answers and webhooks with hostile texts');
  const receiver = await hostileReceiver();
  const add = async (document) => {
    const made = await api('POST', '/api/v1/subscribers', document);
    assert.ok([201, 202].includes(made.status), `${JSON.stringify(document)}: ${await made.text()}`);
  };
  const once = { retry: { max_attempts: 1 } };
  const bundled = { events: ['bundle.#'] };
  // Each with the events that it gets.
  const subscribers = { retrying: texts.length, mortal: texts.length, 'retrying-bundles': whole.length, 'mortal-bundles': whole.length };
  for (const [name, count] of Object.entries(subscribers)) {
    await add({ name, url: receiver.url, ...(count === whole.length && bundled), ...(name.startsWith('mortal') && once) });
  }
  await until('they get events', async () => {
    const { subscribers: all } = await (await api('GET', '/api/v1/subscribers')).json();
    return all.filter(({ subscriber, state }) => subscriber in subscribers && state !== 'starting').length === 4;
  });
  for (const [n, text] of texts.entries()) {
    const some = cut(text, 5000);
    const isBundle = n >= payloads.length;
    const type = isBundle ? `bundle.${cut(text, 240)}` : cut(text, 60); // at most 255 bytes
    const body = JSON.stringify({
      event: type,
      n,
      description: `${isBundle ? 'bundle ' : ''}${n} ${text}`,
      actor: { id: some, type: some, name: some },
      resource: { id: some, type: some, name: some },
      timestamp: some,
      changes: { [some]: { from: some, to: [some] }, other: some },
    });
    await ask('publish', JSON.stringify({ type, id: cut(text, isBundle ? 240 : 60), body }));
  }
  for (const [n, text] of whole.entries()) {
    // `${` is refused there.
    const plain = cut(text, 1000).replaceAll('${', '{');
    const printable = cut(plain.replace(/[^\x20-\x7e]/g, ''), 500).trim();
    await add({
      name: `w-${n}`,
      description: plain,
      url: `http://127.0.0.1:9/${encodeURIComponent(cut(text, 200))}`,
      events: ['nothing.ever'],
      headers: printable ? { 'x-own': printable } : {},
    });
    const paused = await api('POST', `/api/v1/subscribers/w-${n}/pause`, { why: cut(text, 500) });
    assert.equal(paused.status, 200, await paused.text());
  }
  let last;
  await until(() => `each was answered: ${JSON.stringify(last)}`, async () => {
    const counts = async (name) => (await api('GET', `/api/v1/subscribers/${name}`)).json();
    last = await Promise.all(Object.keys(subscribers).map(counts));
    last = last.map(({ subscriber, in_retry, dead }) => ({ subscriber, answered: in_retry + dead }));
    return last.every(({ subscriber, answered }) => answered === subscribers[subscriber]);
  });

  const someone = await Visitor.arrive(browser);
  await someone.signIn(given.token);
  await someone.openUntil('/console/events', 'all are in history', (page) => page.getByText(`${texts.length} events from`).count());

  step('each list, and the pages of what it has');
  const count = whole.length;
  for (const path of [
    '/console/',
    '/console/replays',
    '/console/dead-letters',
    '/console/health',
    '/console/deliveries?subscriber=retrying&limit=100',
    '/console/dead-letters/mortal?limit=100',
    ...(await rows(someone, '/console/events?limit=100', 'Events', count, 'bundle')),
    ...(await rows(someone, '/console/deliveries?subscriber=retrying-bundles', 'Deliveries', count)),
    ...(await rows(someone, '/console/dead-letters/mortal-bundles', 'Dead letters', count)),
    ...(await rows(someone, '/console/webhooks', 'Webhooks', count, 'w-')),
    '/console/webhooks/retrying?retries=show',
    ...whole.map((_, n) => `/console/webhooks/w-${n}/edit`),
  ]) {
    await look(someone, path);
  }

  step('what is typed into an address');
  // A text is shown by the same parts on all of these pages: each page gets a part of the texts, and each text several pages.
  const typedInto = [
    (query) => ['/console/deliveries', query('subscriber', 'state', 'since', 'until', 'odd')],
    (query) => ['/console/dead-letters/mortal', query('reason', 'status', 'type', 'since', 'until', 'odd')],
    (query) => ['/console/webhooks/retrying/replay', query('since', 'events', 'rate', 'odd')],
    (query) => ['/console/replays/new', query('subscriber', 'since', 'events', 'type', 'text')],
    (query) => ['/console/dead-letters/mortal/purge', query('reason', 'type', 'key')],
    (query) => ['/console/resend', query('id')],
    (query) => ['/console/events', query('text', 'actor', 'resource', 'id')],
  ];
  const typed = whole.map((text) => cut(text, 1500));
  for (const [n, text] of typed.entries()) {
    const query = (...names) => new URLSearchParams([...names.map((name) => [name, text]), [text, text]]);
    await look(someone, `/console/events?${query('text', 'type', 'actor', 'resource', 'since', 'until', 'cursor')}`, [200, 400]);
    for (const more of [0, 2, 4]) {
      const [path, asked] = typedInto[(n + more) % typedInto.length](query);
      await look(someone, `${path}?${asked}`, [200, 400, 404]);
    }
    const place = ['webhooks', 'deliveries', 'dead-letters', 'replays'][n % 4];
    await look(someone, `/console/${place}/${encodeURIComponent(text)}`, [200, 400, 404]);
  }

  step('what is typed into a form, also one that is kept over the sign-in');
  const fields = ['name', 'url', 'events', 'description'];
  const values = () => someone.page.evaluate((ids) => ids.map((id) => document.getElementById(id).value), fields);
  for (const text of [...bundles(900), cut(long[1], 900)]) {
    await someone.open('/console/new-webhook');
    await someone.page.evaluate(([ids, text]) => {
      for (const id of ids) document.getElementById(id).value = text;
    }, [fields, text]);
    await someone.press('Save');
    await check(someone, 'a form with mistakes');
    const before = await values();
    await someone.context.clearCookies();
    await someone.press('Save');
    await check(someone, 'a form that is kept');
    await someone.sees('You were signed out');
    await someone.fill('Token', given.token);
    await someone.press('Sign in');
    await check(someone, 'a form that was kept');
    assert.deepEqual(await values(), before);
  }

  step('what a form finds while it is filled in');
  await someone.open('/console/new-webhook');
  await someone.fill('Events', bundled.events[0]);
  const matches = someone.page.getByRole('region', { name: 'What the patterns match' });
  await until('they match', async () => (await matches.getByRole('region', { name: 'Types that match' }).locator('tbody tr').count()) === count);
  await matches.getByText('Types that do not match').first().click();
  await check(someone, 'types of strangers');

  step('files');
  for (const format of ['csv', 'jsonl']) {
    const file = await someone.context.request.get(`${given.origin}/console/events/export?format=${format}`);
    assert.equal(file.status(), 200);
    const text = await file.text();
    if (format === 'jsonl') assert.equal(text.trim().split('\n').length, texts.length);
    // A cell begins after a comma or a line that stands outside of quotes; what is quoted begins after its quote.
    else for (const [cell] of text.matchAll(/(?<=^|[,\n])("(?:[^"]|"")*"|[^",\r\n]*)/g)) assert.doesNotMatch(cell, /^"?[=+\-@\t\r\n]/);
  }

  step('the page of the sign-in');
  const nobody = await Visitor.arrive(browser);
  for (const text of typed) await look(nobody, `/console/${encodeURIComponent(text)}?${new URLSearchParams({ x: text })}`, [401]);
  await nobody.leave();
  await someone.leave();
  receiver.close();
  assert.deepEqual(mistakes.slice(0, 50), []);
});
