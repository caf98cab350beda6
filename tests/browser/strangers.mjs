// What a browser that is signed in gives to others: a token that may only read, pages of other sites, names that lead to this
// machine, and who holds a token that was changed.

import assert from 'node:assert/strict';
import { createServer } from 'node:http';
import { Visitor, api, ask, given, play, publish, step, until } from './lib.mjs';

/** The parts of a URL and of an answer that only admins see. */
const SECRETS = ['/hook/token', 'the receiver says more than it should'];

const isPaused = async () => (await (await api('GET', '/api/v1/subscribers/of-file')).json()).paused != null;

async function links(page) {
  return page.locator('a[href^="/console/"]').evaluateAll((all) => all.map((a) => a.getAttribute('href')));
}

/** All pages that links lead to. */
async function crawl(someone, each) {
  const seen = new Set(['/console/']);
  for (const path of seen) {
    if (path.includes('/export?')) continue; // a file
    const answer = await someone.page.goto(someone.origin + path);
    assert.equal(answer.status(), 200, path);
    await each(path, await answer.text());
    for (const link of await links(someone.page)) seen.add(link.replace(/#.*/, ''));
  }
  return seen;
}

async function whoMayOnlyRead(browser, admin) {
  step('a token that reads sees no path and no answer, and has no form that changes anything');
  const found = new Set();
  const pages = await crawl(admin, (_, text) => SECRETS.forEach((secret) => text.includes(secret) && found.add(secret)));
  assert.deepEqual([...found].sort(), [...SECRETS].sort(), 'an admin sees them');
  const forms = new Set();
  const looker = await Visitor.arrive(browser);
  await looker.signIn(given.reader);
  await crawl(looker, async (path, text) => {
    for (const secret of SECRETS) assert.ok(!text.includes(secret), `${path} has '${secret}'`);
    for (const action of await looker.page.locator('form[method=post]').evaluateAll((all) => all.map((form) => form.getAttribute('action')))) forms.add(action);
  });
  assert.deepEqual([...forms].sort(), ['/console/health/inspect', '/console/sign-out']);

  step('nor does it have its way with forms of its own making');
  const refusals = await looker.page.evaluate(async (paths) => {
    const form_key = document.querySelector('[name=form_key]').value;
    const body = (more) => new URLSearchParams({ form_key, request: 'r', why: 'mischief', since: '2020-01-01', most: '1', backlog: 'drop', ...more });
    const send = async (path) => `${(await fetch(path, { method: 'POST', body: body({}) })).status} ${path}`;
    const all = [];
    for (const path of paths) all.push(await send(path));
    return all;
  }, ['new-webhook', 'new-webhook/test', 'resend', 'dead-letters/of-file/replay', 'dead-letters/of-file/purge', ...['pause', 'resume', 'retry', 'test', 'replay', 'edit', 'edit/test', 'secret', 'remove'].map((action) => `webhooks/of-file/${action}`)].map((path) => `/console/${path}`));
  for (const refusal of refusals) assert.match(refusal, /^403 /);
  for (const path of pages) {
    if (!/\/(pause|resume|retry|replay|purge|new-webhook|edit|secret|remove)(\?|$)|\/resend\?/.test(path)) continue;
    await looker.open(path, 403);
  }
  const { operations } = await (await api('GET', '/api/v1/operations')).json();
  assert.deepEqual(operations, [], 'nothing was done');
  return looker;
}

/** A site of somebody else: a page by its path. */
async function site(pages) {
  const server = createServer((request, answer) => {
    answer.writeHead(pages[request.url] ? 200 : 404, { 'content-type': 'text/html' });
    answer.end(pages[request.url] && `<!doctype html><title>elsewhere</title>${pages[request.url]()}`);
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address();
  // The same machine by its address is the same site for cookies, and another origin; by a name it is another site.
  return { origins: [`http://127.0.0.1:${port}`, `http://evil.example:${port}`], close: () => server.closeAllConnections() || server.close() };
}

async function otherSites(admin) {
  const formKey = await admin.page.locator('[name=form_key]').first().inputValue();
  const evil = await site({
    // The worst case: somebody has the form's key, and only the browser's word on where the form comes from is left.
    '/post': () => `<form method=post action="${given.origin}/console/webhooks/of-file/pause"><input name=form_key value="${formKey}"><input name=why value=mischief></form><script>document.forms[0].submit()</script>`,
    '/frame': () => `<iframe src="${given.origin}/console/" width=800 height=600></iframe>`,
    '/link': () => `<a href="${given.origin}/console/health">look</a>`,
    '/fetch': () => 'nothing yet',
  });
  admin.isDeaf = true;
  const page = await admin.context.newPage();
  for (const origin of evil.origins) {
    step(`a form of ${origin}`);
    const answer = page.waitForResponse((answer) => answer.url().endsWith('/pause'));
    await page.goto(`${origin}/post`);
    const status = (await answer).status();
    assert.ok([401, 403].includes(status), `${status}`);
    assert.ok(!(await isPaused()), 'it was not taken');
    await page.waitForURL('**/pause');
    assert.ok(!(await page.content()).includes('mischief'), 'nor is it shown as what the user has typed');

    step(`a frame of ${origin}`);
    // It is loaded when its frame is.
    await page.goto(`${origin}/frame`);
    const frames = page.frames().filter((frame) => frame !== page.mainFrame());
    assert.equal(frames.length, 1);
    const inside = await frames[0].evaluate(() => document.documentElement.textContent);
    assert.ok(!frames[0].url().startsWith(given.origin) && !inside.includes('hooktrail'), `${frames[0].url()}: ${inside}`);

    step(`a script of ${origin}`);
    await page.goto(`${origin}/fetch`);
    const read = await page.evaluate(async (url) => {
      const tries = ['cors', 'no-cors'].map((mode) => fetch(url, { mode, credentials: 'include' }).then((answer) => answer.text(), () => ''));
      const opened = open(url);
      const image = await new Promise((resolve) => Object.assign(new Image(), { onload: () => resolve('loaded'), onerror: () => resolve(''), src: url.replace(/console\/$/, 'console/assets/') }));
      let reached = '';
      try { reached = opened?.document?.body?.textContent ?? ''; } catch { /* another origin */ }
      opened?.close();
      return [...(await Promise.all(tries)), image, reached].join('');
    }, `${given.origin}/console/`);
    assert.equal(read, '', 'it reads nothing');
  }

  step('a link of another site leads to the sign-in, from which the page is one click away');
  await page.goto(`${evil.origins[1]}/link`);
  await page.getByRole('link').click();
  await page.waitForURL('**/console/health');
  await until('it is the sign-in', async () => (await page.locator('h1').innerText()) === 'Sign in');
  await page.getByRole('link', { name: 'open the page' }).click();
  await until('it is the page', async () => (await page.locator('h1').innerText()) === 'Health');

  step('a name of another that leads to this machine');
  const rebound = given.origin.replace('127.0.0.1', 'evil.example');
  const answer = await page.goto(`${rebound}/console/events`);
  assert.equal(answer.status(), 401, 'no session goes to that name');
  const statuses = await page.evaluate(() => Promise.all(['/console/events', '/api/v1/subscribers', '/api/v1/events'].map(async (path) => (await fetch(path)).status)));
  assert.deepEqual(statuses, [401, 401, 401]);
  const strange = await page.goto(`${given.behind.replace('127.0.0.1', 'evil.example')}/console/`);
  assert.equal(strange.status(), 421, 'with public_url another name is not answered to');
  await page.close();
  evil.close();
  await admin.open('/console/');
  admin.isDeaf = false;
}

async function behindAProxy(browser) {
  step('behind a proxy with TLS');
  const someone = await Visitor.arrive(browser, { origin: given.public, ignoreHTTPSErrors: true });
  await someone.signIn(given.token, '/console/webhooks/of-file');
  assert.equal(await someone.heading(), 'of-file');
  const cookies = await someone.context.cookies();
  assert.equal(cookies.length, 1);
  const { name, path, domain, secure, httpOnly, sameSite } = cookies[0];
  assert.match(name, /^__Host-hooktrail_/);
  assert.deepEqual({ path, domain, secure, httpOnly, sameSite }, { path: '/', domain: 'hooks.example', secure: true, httpOnly: true, sameSite: 'Strict' });
  await someone.follow('Pause');
  await someone.fill('Reason, for whoever looks later', 'over TLS');
  await someone.press('Pause');
  await someone.sees('Paused. Reason: over TLS.');
  await someone.press('Sign out');
  assert.deepEqual(await someone.context.cookies(), []);
  await someone.leave();
}

async function wrongTokens(browser) {
  step('wrong tokens are answered later and later');
  const someone = await Visitor.arrive(browser);
  await someone.open('/console/', 401);
  const waits = [];
  for (let n = 0; n < 4; n += 1) {
    const start = Date.now();
    await someone.fill('Token', `guess-${n}`);
    await someone.press('Sign in');
    waits.push(Date.now() - start);
  }
  [250, 500, 1000, 2000].forEach((least, n) => assert.ok(waits[n] >= least, `${waits} ms`));
  await someone.fill('Token', given.token);
  await someone.press('Sign in');
  assert.equal(await someone.heading(), 'Overview');
  await someone.leave();
}

async function aChangedToken(admin, looker) {
  step('a changed token ends its sessions, also those of pages that are open');
  await admin.open('/console/');
  const form = await admin.context.newPage();
  await form.goto(`${given.origin}/console/webhooks/of-file/pause`);
  await form.getByLabel('Reason, for whoever looks later').fill('a look');
  given.token = await ask('change-token');
  await until('the page that refreshes itself has become the sign-in', async () => (await admin.page.locator('h1').innerText()) === 'Sign in');
  await form.getByRole('button', { name: 'Pause' }).click();
  await until('the form led to the sign-in', async () => (await form.locator('h1').innerText()) === 'Sign in');
  await form.getByLabel('Token').fill(given.token);
  await form.getByRole('button', { name: 'Sign in' }).click();
  await until('the form is there again', async () => (await form.locator('h1').innerText()) === 'Pause of-file');
  assert.equal(await form.getByLabel('Reason, for whoever looks later').inputValue(), 'a look');
  assert.ok(!(await isPaused()), 'it was not taken');
  await looker.open('/console/');
  assert.equal(await looker.heading(), 'Overview', 'the other token is the same');
  // While the daemon was away, the page has asked for it.
  admin.faults = admin.faults.filter(({ kind, text }) => kind !== 'console' || !/net::ERR_/.test(text));
}

await play(async (browser) => {
  step('an admin, and what there is to see');
  const admin = await Visitor.arrive(browser);
  await admin.signIn(given.token);
  await publish({ event: 'user.created', description: 'one' });
  await admin.openUntil('/console/deliveries?state=dead', 'a batch is dead', (page) => page.getByRole('region', { name: 'Deliveries' }).isVisible());
  await admin.openUntil('/console/events', 'the event is in history', (page) => page.getByText('1 event from').first().isVisible());
  const looker = await whoMayOnlyRead(browser, admin);
  await admin.open('/console/');
  await otherSites(admin);
  await behindAProxy(browser);
  await wrongTokens(browser);
  await aChangedToken(admin, looker);
  await looker.leave();
  await admin.leave();
});
