// The way of somebody who sets up a webhook, watches it, mends it and takes it away, once with JavaScript and once without: each
// page of the navigation and each action.

import assert from 'node:assert/strict';
import { Visitor, ask, given, play, publish, step, until } from './lib.mjs';

const event = (type, n) => ({
  event: type,
  description: `${type} number ${n}`,
  actor: { id: 'u-1', type: 'user', name: 'Ada' },
  resource: { id: 'o-1', type: 'order', name: 'Order 1' },
  changes: { state: { from: 'new', to: 'paid' } },
});

async function way(browser, javaScriptEnabled) {
  const name = javaScriptEnabled ? 'with-script' : 'without-script';
  const type = `${name.replace('-', '_')}.paid`;
  step(`${name}: signs in`);
  await ask('answer', '200');
  const permissions = ['clipboard-read', 'clipboard-write'];
  const someone = await Visitor.arrive(browser, { javaScriptEnabled, acceptDownloads: true, permissions });
  const { page } = someone;
  await someone.signIn('not-a-token');
  await someone.sees('This is no token of this daemon');
  assert.equal(await page.getByLabel('Token').getAttribute('aria-invalid'), 'true');
  await someone.fill('Token', given.token);
  await someone.press('Sign in');
  assert.equal(await someone.heading(), 'Overview');

  step(`${name}: New webhook, with a mistake`);
  // Events that nobody gets.
  const seen = type.replace('paid', 'seen');
  await publish(event(seen, 1), event(seen, 2));
  await someone.openUntil('/console/events', 'they are in history', () => page.getByText(`${seen} number 2`).count());
  await someone.follow('Webhooks');
  await someone.follow('New webhook');
  await someone.fill('Name', name);
  await someone.fill('URL', 'ftp://example.com/');
  await someone.fill('Events', type);
  await someone.press('Save');
  assert.equal(await page.getByLabel('URL').getAttribute('aria-invalid'), 'true');
  assert.equal(await page.getByLabel('Name', { exact: true }).inputValue(), name, 'what was typed stays');

  step(`${name}: Run Test before it is saved`);
  await someone.fill('URL', given.receiver);
  await someone.fill('Description', 'the first one');
  await ask('forget');
  await someone.press('Run Test');
  await someone.sees('Test: answered 200');
  assert.equal(await ask('count'), '1', 'one request');
  await page.getByText('Request and answer').click();
  await someone.sees('hooktrail.test');

  step(`${name}: what the patterns match, and an example of the payload`);
  const matches = page.getByRole('region', { name: 'What the patterns match' });
  const headers = page.getByLabel('Headers of the example');
  const body = page.getByLabel('Body of the example');
  assert.match(await matches.getByRole('status').innerText(), /, 0 fit: 0 types of \d+\.$/);
  await matches.getByText('Types that do not match').first().click();
  assert.ok(await matches.getByRole('row', { name: `${seen} 2` }).isVisible());
  assert.match(await headers.innerText(), /^content-type: application\/json$/m);
  if (javaScriptEnabled) await page.evaluate('globalThis.wasLoadedOnce = true');
  await someone.fill('Events', `${type}\n${seen}`);
  await page.getByLabel('Payload format').selectOption('jsonl');
  const shows = async () =>
    /, 2 fit: 1 type of \d+\.$/.test(await matches.getByRole('status').innerText()) && (await headers.innerText()).includes('application/jsonl');
  if (javaScriptEnabled) {
    await until('both are as the form is now', shows);
    assert.ok(await page.evaluate('globalThis.wasLoadedOnce'), 'it was not loaded again');
    for (const [n, part] of [headers, body].entries()) {
      await page.getByRole('region', { name: 'An example of the payload' }).getByRole('button').nth(n).click();
      await until('it is copied', async () => (await page.evaluate('navigator.clipboard.readText()')) === (await part.textContent()));
    }
  } else {
    await someone.press('Show matches');
    assert.ok(await shows());
    assert.equal(await page.getByRole('button', { name: 'Copy' }).count(), 0, 'without JavaScript nothing copies');
  }
  assert.equal(JSON.parse(await body.textContent()).event, 'hooktrail.test');
  const target = await matches.getByRole('link', { name: seen }).getAttribute('href');
  assert.equal(target, `/console/events?type=${seen}`);
  await page.getByLabel('Payload format').selectOption('json');
  await someone.fill('Events', type);

  step(`${name}: a session that is over keeps what was typed`);
  await someone.fill('Signing secret', 'whsec_bWluZQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA');
  await someone.context.clearCookies();
  await someone.press('Save');
  await someone.sees('You were signed out, and nothing was done.');
  await someone.fill('Token', given.token);
  await someone.press('Sign in');
  await someone.sees('You were signed out meanwhile, and nothing was sent.');
  const kept = { Name: name, URL: given.receiver, 'Payload format': 'json', Events: type, Description: 'the first one', 'Signing secret': '' };
  for (const [label, value] of Object.entries(kept)) assert.equal(await page.getByLabel(label, { exact: true }).inputValue(), value, label);
  assert.equal(await ask('count'), '1', 'nothing was sent');

  step(`${name}: Save shows the secret once`);
  await someone.press('Save');
  const secret = await page.getByLabel('Signing secret').innerText();
  assert.match(secret, /^whsec_/);
  if (javaScriptEnabled) {
    await page.getByRole('button', { name: 'Copy' }).click();
    await until('it is copied', async () => (await page.evaluate('navigator.clipboard.readText()')) === secret);
  }
  await someone.follow('To the webhook');
  assert.equal(await someone.heading(), name);
  assert.ok(!(await page.content()).includes(secret));

  step(`${name}: an event is delivered, and is in the Audit Log`);
  await publish(event(type, 1));
  await until('it has arrived', async () => (await ask('count')) === '2');
  await someone.openUntil('/console/events', 'the event', () => page.getByText(`${type} number 1`).count());
  await someone.fill('Search', 'number');
  await someone.fill('Type', type);
  await someone.press('Search');
  assert.equal(await page.getByRole('region', { name: 'Events', exact: true }).getByRole('row').count(), 2);
  await someone.click(page.getByRole('region', { name: 'Events', exact: true }).getByRole('row').nth(1).getByRole('link').first());
  assert.equal(await someone.heading(), `${type} number 1`);
  await someone.sees('paid');
  await someone.openUntil(new URL(page.url()).pathname, 'it was delivered', () =>
    page.getByRole('region', { name: 'Where it went' }).getByRole('row', { name: `${name} delivered` }).count());
  await someone.click(page.getByRole('region', { name: 'Where it went' }).getByRole('row', { name }).getByRole('link').first());
  await someone.sees('Attempt 1: answered 200');

  step(`${name}: Resend`);
  await someone.follow('Resend');
  await someone.sees('A receiver that remembers ids ignores it');
  await someone.press('Resend');
  await someone.sees('It is sent again');
  await until('it has arrived again', async () => (await ask('count')) === '3');

  step(`${name}: the receiver breaks, which the overview says`);
  const figures = page.getByRole('region', { name: 'Subscribers' }).getByRole('row', { name: new RegExp(`^${name} `) });
  const retrying = figures.getByRole('cell').nth(4);
  const hour = figures.getByRole('img', { name: 'In the last hour 2 events delivered, 0 in failed attempts' });
  await someone.openUntil('/console/', 'its last hour', () => hour.count());
  assert.equal(await retrying.innerText(), '0');
  if (javaScriptEnabled) await page.evaluate('globalThis.wasLoadedOnce = true');
  await ask('answer', '500');
  await publish(event(type, 2));
  if (javaScriptEnabled) {
    await until('the page has refreshed itself', async () => (await retrying.innerText()) === '1');
    assert.ok(await page.evaluate('globalThis.wasLoadedOnce'), 'it was not loaded again');
  } else {
    await someone.openUntil('/console/', 'a batch is retried', async () => (await retrying.innerText()) === '1');
  }
  await someone.click(retrying.getByRole('link'));
  const batch = await someone.openUntil(new URL(page.url()).pathname + new URL(page.url()).search, 'the batch', async () => {
    const row = page.getByRole('region', { name: 'Deliveries' }).getByRole('row', { name: 'retrying' });
    return (await row.count()) === 1 && new URL(await row.getByRole('link').first().getAttribute('href'), given.origin).pathname;
  });
  await someone.openUntil(batch, 'its first attempt', () => page.getByText('Attempt 1: answered 500').count());

  step(`${name}: Retry now, broken and mended`);
  const webhook = `/console/webhooks/${name}`;
  // A batch whose attempt has just ended may not be back among those that wait.
  const retryNow = () => until('a batch is made due', async () => {
    await someone.open(webhook);
    await someone.follow('Retry now');
    await someone.press('Retry now');
    return page.getByText('1 batch made due now').count();
  });
  await someone.open(webhook);
  await someone.follow('Show the batches that wait');
  assert.equal(await page.getByRole('region', { name: 'Retries' }).getByRole('row').count(), 2);
  await retryNow();
  await someone.openUntil(batch, 'its second attempt', () => page.getByText('Attempt 2: answered 500').count());
  await ask('answer', '200');
  await retryNow();
  await someone.openUntil(batch, 'its third attempt', () => page.getByText('Attempt 3: answered 200').count());

  step(`${name}: Replay`);
  await ask('forget');
  await someone.open(webhook);
  await someone.follow('Replay');
  await someone.fill('Since (UTC)', '2020-01-01');
  await someone.press('Count');
  const counted = new URL(page.url());
  await someone.openUntil(counted.pathname + counted.search, 'both are in history', () => page.getByText('2 events from').count());
  await someone.press('Replay');
  await someone.sees('has begun');
  await someone.openUntil('/console/replays', 'it is done', () => page.getByRole('row', { name: `${name} done` }).count());
  await until('it has arrived', async () => Number(await ask('replayed')) >= 1);
  const ofReplay = page.getByRole('row', { name: `${name} done` });
  await someone.openUntil('/console/replays', 'its batches are delivered', () => ofReplay.getByRole('link', { name: /^\d+ delivered$/ }).count());
  await ofReplay.getByRole('link', { name: /delivered/ }).click();
  await someone.sees('Begun since (UTC)');
  await page.getByRole('region', { name: 'Deliveries' }).getByRole('link', { name: 'UTC' }).first().click();
  await page.getByRole('region', { name: 'Events of the batch' }).getByRole('link', { name: 'UTC' }).first().click();
  await someone.follow('Replay this time');
  await page.getByLabel('Subscriber', { exact: true }).selectOption(name);
  await someone.press('Count');
  await someone.sees('will be sent');

  step(`${name}: a replay is cancelled, and continued`);
  await publish(...Array.from({ length: 200 }, (_, n) => event(type, n + 3)));
  await someone.openUntil('/console/events?type=' + type, '202 events', () => page.getByText('202 events from').count());
  await someone.open(`${webhook}/replay`);
  await someone.fill('Since (UTC)', '2020-01-01');
  await someone.fill('Events a second, at most', '1');
  await someone.press('Count');
  await someone.press('Replay');
  await someone.follow('Cancel');
  await someone.press('End it');
  await someone.sees('is cancelled');
  await someone.follow('Continue');
  await someone.press('Continue');
  await someone.sees('goes on');
  await someone.follow('Cancel');
  await someone.press('End it');

  step(`${name}: Pause, Resume and Run Test`);
  await someone.open(webhook);
  await someone.follow('Pause');
  await someone.fill('Reason, for whoever looks later', 'moving house');
  await someone.press('Pause');
  await someone.sees('Paused. Reason: moving house.');
  await someone.follow('Resume');
  await someone.sees('moving house');
  await someone.press('Resume');
  await someone.sees('Resumed.');
  await until('a second has passed since the last test', async () => {
    await someone.open(webhook);
    await someone.press('Run Test');
    return page.getByText('Test: answered 200').count();
  });

  step(`${name}: Edit and New secret`);
  await someone.open(webhook);
  await someone.follow('Edit');
  await someone.fill('Description', 'the second one');
  await page.getByLabel('Payload format').selectOption('jsonl');
  await someone.press('Save');
  await someone.sees('Saved.');
  await someone.follow('New secret');
  await someone.press('Make a new secret');
  const second = await page.getByLabel('Signing secret').innerText();
  assert.notEqual(second, secret);

  step(`${name}: dead letters`);
  await publish(event('dead.one', 1), event('dead.one', 2));
  await someone.openUntil('/console/dead-letters/of-file', 'two letters', async () =>
    (await page.getByRole('region', { name: 'Dead letters' }).getByRole('row').count()) === 3);
  await someone.click(page.getByRole('region', { name: 'Dead letters' }).getByRole('row').nth(1).getByRole('link').first());
  await someone.sees('Attempt 1: answered 500');
  await someone.follow('Purge');
  await someone.sees('1 dead letter');
  await someone.press('Delete for good');
  await someone.sees('1 letter was purged');
  await someone.follow('Replay all');
  await someone.press('Replay');
  await someone.sees('1 letter was replayed');
  await someone.openUntil('/console/dead-letters/of-file', 'it is dead again', () => page.getByRole('link', { name: 'Purge all' }).count());
  await someone.follow('Purge all');
  await someone.press('Delete for good');

  step(`${name}: Health`);
  await someone.follow('Health');
  await someone.press('Inspect queue and endpoints');
  await someone.sees('Inspected at');

  step(`${name}: files`);
  await someone.follow('Audit Log');
  const [file] = await Promise.all([page.waitForEvent('download'), page.getByRole('link', { name: 'CSV' }).click()]);
  assert.match(file.suggestedFilename(), /^audit-log-.*\.csv$/);
  assert.equal(await file.failure(), null);

  step(`${name}: Remove`);
  await someone.open(webhook);
  await someone.follow('Remove');
  await page.getByLabel('is deleted').check();
  await someone.press('Remove');
  await someone.sees(`${name} is removed.`);

  step(`${name}: Sign out`);
  await someone.press('Sign out');
  assert.equal(await someone.heading(), 'Sign in');
  await someone.open('/console/', 401);
  assert.deepEqual(await someone.context.cookies(), []);
  await someone.leave();
}

await play(async (browser) => {
  for (const javaScriptEnabled of [true, false]) await way(browser, javaScriptEnabled);
});
