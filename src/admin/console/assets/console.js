// Everything works without this module. It shows times as "3 min ago" beside the exact time, and refreshes a page that is
// looked at.

const UNITS = [[86400, 'day'], [3600, 'hour'], [60, 'minute'], [1, 'second']];
const words = new Intl.RelativeTimeFormat('en', { numeric: 'always', style: 'short' });

/** The time from now in words, such as `3 min. ago`. */
function relative(at) {
  const seconds = Math.round((at - Date.now()) / 1000);
  const [unit, name] = UNITS.find(([unit]) => Math.abs(seconds) >= unit) ?? UNITS.at(-1);
  return words.format(Math.trunc(seconds / unit), name);
}

function showTimes(root) {
  for (const time of root.querySelectorAll('time[datetime]')) {
    time.title = relative(Date.parse(time.dateTime));
  }
}

/** Replaces the parts of the page that are marked with `data-live` by those of a new answer. */
async function refresh() {
  const answer = await fetch(location.href, { headers: { accept: 'text/html' } });
  // Another page, such as that of the sign-in, is not a part of this one.
  if (!answer.ok || answer.redirected) return;
  const next = new DOMParser().parseFromString(await answer.text(), 'text/html');
  for (const part of document.querySelectorAll('[data-live]')) {
    const found = next.getElementById(part.id);
    if (found && found.innerHTML !== part.innerHTML) part.replaceChildren(...found.childNodes);
  }
  showTimes(document);
}

/** Whether a refresh would take something from the reader's hands. */
function isInUse() {
  const selection = getSelection();
  const focused = document.activeElement?.closest('[data-live]');
  return document.hidden || (selection && !selection.isCollapsed) || Boolean(focused);
}

function poll() {
  const seconds = Number(document.body.dataset.refresh);
  if (!seconds) return;
  const again = () => setTimeout(async () => {
    if (!isInUse()) await refresh().catch(() => {}); // the next one may succeed
    again();
  }, seconds * 1000);
  again();
}

showTimes(document);
poll();
