// Everything works without this module. It tells how long ago a time was when the pointer is on it, refreshes a page that is
// looked at, copies, and shows what a form would do while it is filled in.

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

/** The element that a button of its own copies; where the browser allows that, the button is shown. */
function showCopies(within) {
  if (!navigator.clipboard) return;
  for (const button of within.querySelectorAll('button[data-copy]')) button.hidden = false;
}

document.addEventListener('click', async ({ target }) => {
  const button = target.closest?.('button[data-copy]');
  if (!button) return;
  try {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
    button.textContent = 'Copied';
  } catch {
    button.textContent = 'Not allowed here';
  }
  setTimeout(() => { button.textContent = 'Copy'; }, 2000);
});

/** The parts that show what a form would do, as an answer has them. */
function preview(next) {
  for (const part of document.querySelectorAll('[data-preview]')) {
    const found = next.getElementById(part.id);
    if (!found || part.contains(document.activeElement)) continue;
    const open = [...part.querySelectorAll('details')].map((details) => details.open);
    part.replaceChildren(...found.childNodes);
    part.querySelectorAll('details').forEach((details, n) => { details.open = open[n] ?? false; });
    showCopies(part);
  }
}

/** Shows what a form would do while it is filled in, half a second after the last letter. */
function previewWhileTyping(form) {
  let asked = new AbortController();
  form.addEventListener('input', () => {
    asked.abort();
    asked = new AbortController();
    const { signal } = asked;
    setTimeout(async () => {
      if (signal.aborted) return;
      try {
        const body = new URLSearchParams(new FormData(form));
        const answer = await fetch(form.dataset.previews, { method: 'POST', body, signal });
        if (answer.ok) preview(new DOMParser().parseFromString(await answer.text(), 'text/html'));
      } catch {
        // It was typed on, or the daemon is away: the button says so.
      }
    }, 500);
  });
}

showCopies(document);
document.querySelectorAll('form[data-previews]').forEach(previewWhileTyping);
