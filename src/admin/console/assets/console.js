// Everything works without this module. It tells how long ago a time was when the pointer is on it, and refreshes a page that is
// looked at.

const UNITS = [[86400, 'day'], [3600, 'hour'], [60, 'minute'], [1, 'second']];
const words = new Intl.RelativeTimeFormat('en', { numeric: 'always', style: 'short' });

/** The time from now in words, such as `3 min. ago`. */
function relative(at) {
  const seconds = Math.round((at - Date.now()) / 1000);
  const [unit, name] = UNITS.find(([unit]) => Math.abs(seconds) >= unit) ?? UNITS.at(-1);
  return words.format(Math.trunc(seconds / unit), name);
}

document.addEventListener('pointerover', ({ target }) => {
  const time = target.closest?.('time[datetime]');
  if (time) time.title = relative(Date.parse(time.dateTime));
});

/** Whether a refresh would take something from the reader's hands. */
function isInUse() {
  const selection = getSelection();
  const focused = document.activeElement?.closest('[data-live] :is(a, button, input, select)');
  return document.hidden || (selection && !selection.isCollapsed) || Boolean(focused);
}

/** The parts of the page that change, each as it was last received. */
const received = new Map();

/** Replaces those parts that are other than before. */
function show(next) {
  for (const part of document.querySelectorAll('[data-live]')) {
    const found = next.getElementById(part.id);
    if (!found || found.innerHTML === received.get(part.id)) continue;
    received.set(part.id, found.innerHTML);
    const scrolled = [...part.querySelectorAll('.scroll')].map((element) => element.scrollLeft);
    part.replaceChildren(...found.childNodes);
    part.querySelectorAll('.scroll').forEach((element, n) => { element.scrollLeft = scrolled[n] ?? 0; });
  }
}

const stale = document.createElement('p');
stale.className = 'stale';
stale.setAttribute('role', 'status');

async function refresh() {
  const answer = await fetch(location.href, { headers: { accept: 'text/html' } });
  if (answer.status === 401 || answer.redirected) return location.reload(); // the sign-in
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  const next = new DOMParser().parseFromString(await answer.text(), 'text/html');
  if (!isInUse()) show(next);
  stale.remove();
}

function poll() {
  const seconds = Number(document.body.dataset.refresh);
  if (!seconds) return;
  for (const part of document.querySelectorAll('[data-live]')) received.set(part.id, part.innerHTML);
  let since = new Date();
  const again = () => setTimeout(async () => {
    if (!isInUse()) {
      try {
        await refresh();
        since = new Date();
      } catch {
        stale.textContent = `The daemon does not answer. This is how it was at ${since.toISOString().slice(11, 19)} UTC.`;
        document.querySelector('.head').after(stale);
      }
    }
    again();
  }, seconds * 1000);
  again();
}

poll();
