// What the scripts share: a browser, visitors whose every fault is noted, and waits for conditions.
//
// A script is started by tests/it/operators/browser.rs with
//   GIVEN      a JSON object: what the test says of its daemon
//   STAGE      an address; what is POSTed to STAGE/WHAT, the test does
//   EVIDENCE   a folder for what a failed script has seen
//   VERIFIERS  the folder with node_modules

import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { stripVTControlCharacters } from 'node:util';

// They are installed next to this run's target folder, not next to this file.
const load = createRequire(`${process.env.VERIFIERS}/package.json`);
const { chromium } = load('playwright-core');
const axe = readFileSync(load.resolve('axe-core/axe.min.js'), 'utf8');

export const given = JSON.parse(process.env.GIVEN);

/** The longest wait for a condition before the script fails, in milliseconds: far more than it ever takes. */
const PATIENCE = 120_000;

/** Has the test do something. Returns its answer. */
export async function ask(what, body = '') {
  const answer = await fetch(`${process.env.STAGE}/${what}`, { method: 'POST', body });
  const text = await answer.text();
  assert.equal(answer.status, 200, `the test does not know how to ${what}: ${text}`);
  return text;
}

/** A request to the API with a token. */
export async function api(method, path, body, token = given.token) {
  const headers = { authorization: `Bearer ${token}`, 'content-type': 'application/json' };
  return fetch(given.origin + path, { method, headers, body: body && JSON.stringify(body) });
}

/** Publishes events. */
export async function publish(...events) {
  const answer = await api('POST', '/api/v1/events', { events });
  assert.equal(answer.status, 202, `${await answer.text()}: ${JSON.stringify(events).slice(0, 200)}`);
}

/** Waits until `condition` returns something. Returns that. `what` is a text, or returns one. */
export async function until(what, condition) {
  const end = Date.now() + PATIENCE;
  for (;;) {
    const found = await condition();
    if (found) return found;
    assert.ok(Date.now() < end, `not within ${PATIENCE / 1000} s: ${typeof what === 'function' ? what() : what}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

let at = 'the start';
const start = Date.now();

/** Names what is being done, for a failure. */
export function step(name) {
  at = name;
  console.log(`${((Date.now() - start) / 1000).toFixed(1).padStart(6)} s: ${name}`);
}

const visitors = new Set();

/** A browser context that notes each fault of a page: what it may never do, whatever it shows. */
export class Visitor {
  faults = [];

  static async arrive(browser, options = {}) {
    const visitor = new Visitor();
    visitor.origin = options.origin ?? given.origin;
    visitor.context = await browser.newContext({ viewport: { width: 1280, height: 900 }, reducedMotion: 'reduce', ...options });
    visitor.context.setDefaultTimeout(PATIENCE);
    visitor.context.on('page', (page) => visitor.#watch(page));
    visitor.page = await visitor.context.newPage();
    await visitor.watching.get(visitor.page);
    visitors.add(visitor);
    return visitor;
  }

  /** Whether nothing is noted now: what others' pages do is no fault of the console. */
  isDeaf = false;

  #note(kind, text) {
    if (!this.isDeaf) this.faults.push({ kind, text: `${text}`.slice(0, 500), at });
  }

  watching = new Map();

  #watch(page) {
    page.on('request', (request) => {
      if (new URL(request.url()).origin !== this.origin) this.#note('request', request.url());
    });
    page.on('dialog', (dialog) => {
      this.#note('dialog', dialog.message());
      dialog.dismiss().catch(() => {});
    });
    page.on('pageerror', (error) => this.#note('error', error));
    page.on('console', (message) => {
      // The browser's own word on the status of a page: scripts say which they expect.
      const isStatus = message.text().startsWith('Failed to load resource: the server responded with a status of 4');
      const isPage = message.location().url.startsWith(`${this.origin}/console/`) && !message.location().url.includes('/assets/');
      if (['error', 'warning', 'assert'].includes(message.type()) && !(isStatus && isPage)) this.#note('console', message.text());
    });
    page.on('popup', (popup) => this.#note('popup', popup.url()));
    const watching = this.#audit(page);
    watching.catch(() => {}); // the page was closed again
    this.watching.set(page, watching);
  }

  /** The browser's reports on its policies come also where no script may run. */
  async #audit(page) {
    const session = await this.context.newCDPSession(page);
    session.on('Audits.issueAdded', ({ issue }) => {
      if (issue.code === 'ContentSecurityPolicyIssue') this.#note('policy', JSON.stringify(issue.details));
    });
    await session.send('Audits.enable');
  }

  /** Loads a page of the console, which must have this status. */
  async open(path, status = 200) {
    const answer = await this.page.goto(this.origin + path);
    assert.equal(answer.status(), status, path);
  }

  /** Opens a page until it is as `condition` wants it. Returns what that returns. */
  async openUntil(path, what, condition) {
    return until(`${path}: ${what}`, async () => {
      await this.open(path);
      return condition(this.page);
    });
  }

  async heading() {
    return this.page.locator('h1').innerText();
  }

  async sees(text) {
    const seen = await this.page.locator('body').innerText();
    assert.ok(seen.includes(text), `${this.page.url()} does not say '${text}':\n${seen.slice(0, 3000)}`);
  }

  /** Does what leads to another page, and waits for that. */
  async lead(act) {
    const { page } = this;
    const arrival = page.waitForEvent('framenavigated', (frame) => frame === page.mainFrame());
    await Promise.all([arrival, act()]);
    await page.waitForLoadState();
  }

  /** Clicks, and waits for the page that this leads to. */
  async click(locator) {
    await this.lead(() => locator.click());
  }

  async follow(name) {
    await this.click(this.page.getByRole('link', { name, exact: true }).first());
  }

  async fill(label, text) {
    await this.page.getByLabel(label, { exact: true }).fill(text);
  }

  async press(name) {
    await this.click(this.page.getByRole('button', { name, exact: true }));
  }

  async signIn(token, path = '/console/') {
    await this.open(path, 401);
    await this.fill('Token', token);
    await this.press('Sign in');
  }

  /** Fails if anything was noted. */
  quiet() {
    assert.deepEqual(this.faults, [], 'the pages did what they may not do');
  }

  async leave() {
    this.quiet();
    await this.vanish();
  }

  /** Leaves, whatever was noted. */
  async vanish() {
    visitors.delete(this);
    await this.context.close();
  }
}

/** Runs a script with a browser. */
export async function play(script) {
  rmSync(process.env.EVIDENCE, { recursive: true, force: true });
  const hosts = ['hooks.example', 'evil.example'].map((name) => `MAP ${name} 127.0.0.1`);
  const rules = [...hosts, 'MAP * ~NOTFOUND', 'EXCLUDE 127.0.0.1'].join(', ');
  const browser = await chromium.launch({
    executablePath: execFileSync('sh', ['-c', 'command -v chromium'], { encoding: 'utf8' }).trim(),
    timeout: PATIENCE,
    // No name leads out of this machine, and no proxy does.
    args: [`--host-resolver-rules=${rules}`, '--no-proxy-server'],
  });
  try {
    await script(browser);
    visitors.forEach((visitor) => visitor.quiet());
  } catch (error) {
    console.error(stripVTControlCharacters(`failed at '${at}': ${error.stack}`));
    await collect(error);
    process.exitCode = 1;
  } finally {
    await browser.close();
  }
  // Servers of the script may still listen.
  process.exit();
}

/** Keeps what the visitors see. */
async function collect() {
  mkdirSync(process.env.EVIDENCE, { recursive: true });
  let n = 0;
  for (const { context, faults } of visitors) {
    if (faults.length > 0) console.error('noted:', faults);
    for (const page of context.pages()) {
      const name = join(process.env.EVIDENCE, `${n++}`);
      try {
        writeFileSync(`${name}.html`, await page.content());
        await page.screenshot({ path: `${name}.png`, fullPage: true, timeout: 10_000 });
        console.error(`${page.url()} as it was: ${name}.png, ${name}.html`);
      } catch (error) {
        console.error(`${page.url()} could not be kept: ${error.message}`);
      }
    }
  }
}

/** What axe-core finds wrong with a page, by the rules of WCAG 2.2, levels A and AA; or by some rules alone. */
export async function violations(page, rules) {
  if (!(await page.evaluate('"axe" in globalThis'))) await page.evaluate(axe);
  const runOnly = rules ?? ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa'];
  return page.evaluate(async (runOnly) => {
    const found = await globalThis.axe.run(document, { runOnly, resultTypes: ['violations'], preload: false });
    return found.violations.map(({ id, help, nodes }) =>
      `${id}: ${help}: ${nodes.map((node) => `${node.html.slice(0, 200)} (${node.failureSummary.replaceAll('\n', ' ')})`).join('; ')}`);
  }, runOnly);
}
