// Each page is usable: by the rules of WCAG 2.2, levels A and AA, in light and dark, and at 360 pixels of width, where no page
// scrolls sideways; and somebody without a mouse gets from the sign-in to an action.

import assert from 'node:assert/strict';
import { Visitor, api, ask, given, play, publish, step, until, violations } from './lib.mjs';

/** What was found on all pages: they are told together. */
const mistakes = [];

const NARROW = { width: 360, height: 740 };

/** Looks at the page that is shown, under a name: narrow in light and dark, and if that is asked for wide too. */
async function look(someone, name, { isWide = false } = {}) {
  const { page } = someone;
  const found = (await violations(page)).map((text) => `narrow: ${text}`);
  const { scrollWidth, clientWidth } = await page.evaluate(() => {
    const { scrollWidth, clientWidth } = document.scrollingElement;
    return { scrollWidth, clientWidth };
  });
  if (scrollWidth > clientWidth) found.push(`narrow: the page is ${scrollWidth} pixels wide, of ${clientWidth}`);
  await page.emulateMedia({ colorScheme: 'dark' });
  found.push(...(await violations(page, ['color-contrast'])).map((text) => `dark: ${text}`));
  await page.emulateMedia({ colorScheme: 'light' });
  if (isWide) {
    await page.setViewportSize({ width: 1280, height: 900 });
    found.push(...(await violations(page)).map((text) => `wide: ${text}`));
    await page.setViewportSize(NARROW);
  }
  mistakes.push(...found.map((text) => `${name}: ${text}`));
}

async function everyPage(browser) {
  step('the pages without a session');
  const someone = await Visitor.arrive(browser, { viewport: NARROW });
  const { page } = someone;
  await someone.open('/console/', 401);
  await look(someone, 'sign-in');
  await someone.fill('Token', 'not-a-token');
  await someone.press('Sign in');
  await look(someone, 'sign-in with a wrong token');
  await someone.fill('Token', given.token);
  await someone.press('Sign in');

  step('lists without rows');
  for (const path of ['events', 'deliveries', 'replays', 'dead-letters', 'health']) {
    await someone.open(`/console/${path}`);
    await look(someone, path);
  }

  step('the form of a webhook');
  await someone.open('/console/new-webhook');
  await look(someone, 'new webhook');
  await someone.fill('Name', 'Not A Name');
  await someone.fill('URL', 'ftp://example.com/');
  await someone.fill('Events', 'a..b');
  await someone.fill('Signing secret', 'x');
  await someone.press('Save');
  await look(someone, 'new webhook with mistakes');
  await someone.fill('Name', 'siem');
  await someone.fill('URL', given.receiver);
  await someone.fill('Events', 'user.*');
  await someone.fill('Signing secret', '');
  await someone.press('Run Test');
  await page.getByText('Request and answer').click();
  await look(someone, 'new webhook with a test', { isWide: true });
  await someone.press('Save');
  await look(someone, 'a secret');

  step('lists with rows');
  await ask('answer', '500');
  const long = 'a-name-that-goes-on-without-any-room-to-break-it-'.repeat(8);
  await publish(
    ...['user.created', 'dead.one', 'dead.two'].map((event) => ({
      event,
      description: `What happened to ${long}`,
      actor: { id: long, type: 'user', name: long },
      resource: { id: 'o-1', type: 'order', name: 'Order 1' },
      timestamp: '2026-01-31T12:00:00Z',
      changes: { [long]: { from: '[FILTERED]', to: long }, address: { from: { street: long }, to: null } },
    })),
  );
  const first = (region) => page.getByRole('region', { name: region, exact: true }).locator('tbody a').first();
  await someone.openUntil('/console/deliveries?state=retrying', 'a batch is retried', () => page.getByText('retrying', { exact: true }).nth(1).isVisible());
  await someone.openUntil('/console/dead-letters/of-file', 'two are dead', () => page.getByRole('link', { name: 'Purge all' }).isVisible());
  await look(someone, 'dead letters of one');
  await someone.click(first('Dead letters'));
  await look(someone, 'a dead letter');
  await someone.openUntil('/console/events', 'the events', () => page.getByText('3 events from').first().isVisible());
  await page.getByText('As a table').first().click();
  await look(someone, 'audit log', { isWide: true });
  await someone.click(first('Events'));
  await look(someone, 'an event', { isWide: true });
  await someone.open('/console/deliveries');
  await look(someone, 'deliveries', { isWide: true });
  await someone.click(first('Deliveries'));
  await look(someone, 'a batch');
  await someone.follow('Resend');
  await look(someone, 'resend');
  await someone.press('Resend');
  await look(someone, 'a batch that was resent');
  await someone.open('/console/webhooks/siem/replay?since=2020-01-01');
  await look(someone, 'replay, counted');
  await someone.press('Replay');
  await look(someone, 'replays');
  await someone.open('/console/replays/new?type=user.*&actor=someone');
  await look(someone, 'a new replay');
  await someone.open('/console/');
  await look(someone, 'overview', { isWide: true });
  await someone.open('/console/webhooks');
  await look(someone, 'webhooks', { isWide: true });
  await someone.open('/console/webhooks/siem/edit');
  await page.getByText('Types that do not match').first().click();
  await look(someone, 'a form with types', { isWide: true });
  await someone.context.clearCookies();
  await someone.press('Save');
  await look(someone, 'sign-in that keeps a form');
  await someone.fill('Token', given.token);
  await someone.press('Sign in');
  await look(someone, 'a form that was kept');
  await someone.open('/console/webhooks/siem?retries=show');
  for (const table of await page.getByText('As a table').all()) await table.click();
  await look(someone, 'a webhook', { isWide: true });
  await someone.press('Run Test');
  await look(someone, 'a webhook with a test');
  for (const path of ['webhooks/of-file', 'webhooks/siem/pause', 'webhooks/siem/resume', 'webhooks/siem/retry', 'webhooks/siem/secret', 'webhooks/siem/remove', 'dead-letters', 'dead-letters/of-file/replay', 'dead-letters/of-file/purge', 'dead-letters/of-file/purge?reason=refused']) {
    await someone.open(`/console/${path}`);
    await look(someone, path);
  }
  await someone.open('/console/health');
  await someone.press('Inspect queue and endpoints');
  await look(someone, 'health, inspected');

  step('refusals');
  for (const [path, status] of [
    ['nothing', 404],
    ['events?since=last+week&type=a.%23.b&odd=x', 400],
    ['deliveries?state=odd&since=x', 400],
    ['dead-letters/of-file?status=odd&since=x', 400],
    ['webhooks/siem/replay?since=x&rate=y', 400],
    ['webhooks/of-file/edit', 409],
    ['events/999999', 404],
  ]) {
    await someone.open(`/console/${path}`, status);
    await look(someone, path);
  }
  await someone.leave();

  step('the pages of who may only look');
  const looker = await Visitor.arrive(browser, { viewport: NARROW });
  await looker.signIn(given.reader);
  for (const [path, status] of [['', 200], ['webhooks', 200], ['webhooks/siem', 200], ['webhooks/siem/pause', 403]]) {
    await looker.open(`/console/${path}`, status);
    await look(looker, `${path}, read`);
  }
  await looker.leave();
}

/** What is focused: its name and whether somebody sees that it is. */
const focused = (page) => page.evaluate(() => {
  const element = document.activeElement;
  const style = getComputedStyle(element);
  const { top, left, bottom, right, width, height } = element.getBoundingClientRect();
  const label = element.labels?.[0]?.textContent ?? element.getAttribute('aria-label') ?? element.textContent;
  return {
    role: element.localName,
    name: label.trim(),
    isSeen: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2 && width > 0 && height > 0
      && bottom > 0 && right > 0 && top < innerHeight && left < innerWidth,
  };
});

/** Goes on with Tab until that is focused; each stop must be seen. */
async function tab(page, role, name) {
  const stops = [];
  for (let n = 0; n < 80; n += 1) {
    await page.keyboard.press('Tab');
    const now = await focused(page);
    if (now.role === 'body') continue; // the end of the page: it begins again
    stops.push(`${now.role} '${now.name.slice(0, 40)}'`);
    assert.ok(now.isSeen, `nobody sees that ${stops.at(-1)} is focused`);
    if (now.role === role && now.name === name) return;
  }
  assert.fail(`no Tab leads to ${role} '${name}', only to ${stops.join(', ')}`);
}

async function byKeyboard(browser) {
  step('by keyboard: sign in');
  const someone = await Visitor.arrive(browser, { permissions: ['clipboard-write'] });
  const { page } = someone;
  const { keyboard } = page;
  const enter = () => someone.lead(() => keyboard.press('Enter'));
  await someone.open('/console/', 401);
  assert.deepEqual(await focused(page), { role: 'input', name: 'Token', isSeen: true }, 'the field is focused at once');
  await keyboard.type(given.token);
  await enter();
  assert.equal(await someone.heading(), 'Overview');

  step('by keyboard: past the navigation');
  await tab(page, 'a', 'To the content');
  await keyboard.press('Enter');
  await until('the content is next', () => page.evaluate(() => location.hash === '#main'));
  await keyboard.press('Tab');
  assert.ok(await page.evaluate(() => document.querySelector('main').contains(document.activeElement)));

  step('by keyboard: New webhook');
  await tab(page, 'a', 'Webhooks');
  await enter();
  await tab(page, 'a', 'New webhook');
  await enter();
  const fields = [
    ['input', 'Name', 'by-keyboard'],
    ['input', 'URL', given.receiver],
    ['select', 'Payload format', null],
    ['textarea', 'Events', 'keyboard.*'],
    ['input', 'Description', 'made without a mouse'],
  ];
  for (const [role, name, text] of fields) {
    await tab(page, role, name);
    if (text === null) await keyboard.press('ArrowDown');
    else await keyboard.type(text);
  }
  assert.equal(await page.getByLabel('Payload format').inputValue(), 'jsonl');
  await tab(page, 'input', 'Begin paused: events are kept from now on, and sent when it is resumed');
  await keyboard.press('Space');
  await ask('answer', '200');
  await tab(page, 'button', 'Run Test');
  await enter();
  await someone.sees('Test: answered 200');
  await tab(page, 'summary', 'Request and answer');
  await keyboard.press('Enter');
  await someone.sees('application/jsonl');
  await tab(page, 'button', 'Copy');
  await keyboard.press('Enter');
  await until('it says so', async () => (await focused(page)).name === 'Copied');
  await tab(page, 'button', 'Save');
  await enter();
  await tab(page, 'pre', 'Signing secret');
  await tab(page, 'a', 'To the webhook');
  await enter();
  await someone.sees('paused');

  step('by keyboard: Resume and Sign out');
  await tab(page, 'a', 'Resume');
  await enter();
  await tab(page, 'button', 'Resume');
  await enter();
  await someone.sees('Resumed.');
  assert.equal((await api('GET', '/api/v1/subscribers/by-keyboard').then((answer) => answer.json())).paused ?? null, null);
  await tab(page, 'button', 'Sign out');
  await enter();
  assert.equal(await someone.heading(), 'Sign in');
  await someone.leave();
}

await play(async (browser) => {
  await everyPage(browser);
  await byKeyboard(browser);
  assert.deepEqual(mistakes, []);
});
