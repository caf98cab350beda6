// Texts that must be shown, and do nothing. One that runs calls alert(1), or asks another host.

const OTHER = '//other.example/x';

export const payloads = [
  // Elements.
  '<script>alert(1)</script>',
  '<ScRiPt src=//other.example/x.js></sCrIpT>',
  '<script type=module>alert(1)</script >',
  '<<script>alert(1)//<</script>',
  `<img src=x onerror=alert(1)>`,
  `<img src=${OTHER}>`,
  '<svg onload=alert(1)>',
  '<svg><script>alert(1)</script></svg>',
  '<svg><animate onbegin=alert(1) attributeName=x dur=1s>',
  '<math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>',
  '<iframe srcdoc="<script>parent.alert(1)</script>"></iframe>',
  `<object data=${OTHER}></object><embed src=${OTHER}>`,
  '<details open ontoggle=alert(1)>',
  '<input autofocus onfocus=alert(1)>',
  '<video><source onerror=alert(1)></video>',
  `<base href=${OTHER}><link rel=stylesheet href=${OTHER}>`,
  `<meta http-equiv=refresh content="0;url=${OTHER}">`,
  `<form action=${OTHER} id=webhook><button>Save</button></form>`,
  '<noscript><p title="</noscript><img src=x onerror=alert(1)>">',
  // Ends of what it stands in.
  '"><img src=x onerror=alert(1)>',
  "'><img src=x onerror=alert(1)>",
  '" onmouseover="alert(1)" autofocus onfocus="alert(1)" x="',
  "' onmouseover='alert(1)' autofocus onfocus='alert(1)' x='",
  '` onmouseover=alert(1) `',
  '</textarea></title></option></select></pre><img src=x onerror=alert(1)>',
  '</main></body></html><script>alert(1)</script>',
  '--><img src=x onerror=alert(1)><!--',
  ']]><img src=x onerror=alert(1)>',
  // Styles.
  `<style>*{display:none}@import "${OTHER}"</style>`,
  `x;background:url(${OTHER})" style="background:url(${OTHER})`,
  // Addresses.
  'javascript:alert(1)',
  ' java\tscript:alert(1)//',
  'data:text/html,<script>alert(1)</script>',
  `${OTHER}/../console/`,
  '../../api/v1/reload?x#y',
  '.',
  '..',
  // Entities and templates.
  '&lt;img src=x onerror=alert(1)&gt; &#60;script&#62;alert(1)&#60;/script&#62;',
  '{{constructor.constructor("alert(1)")()}}${alert(1)}<%= alert(1) %>',
  // Letters that nobody sees, or that turn the others.
  'evil\u202egpj.exe \u2066isolated\u2069 \u200fmarked',
  'ad\u200bmin\ufeff\u00ad\u2060',
  '\u0000\u0001\u001b[2J\u007f\u0085\u009b31m',
  'Z\u0338\u0334\u0335\u0336\u0337'.repeat(40),
  'a\r\nset-cookie: x=1\r\n\r\n<script>alert(1)</script>',
  '\ud83d\ude00\u{10ffff}\u{e0041}',
  // What a spreadsheet would run.
  "=cmd|' /C calc'!A0",
  `=HYPERLINK("http:${OTHER}","x")`,
  '+1+cmd|x!A',
  '-2+3',
  '@SUM(1)',
  '\t=1+1',
];

export const long = ['x'.repeat(1 << 20), '<b>'.repeat(1 << 12)];

/** A text's beginning. */
export const cut = (text, most) => [...text].slice(0, most).join('');

const bytes = (text) => new TextEncoder().encode(text).length;

/** All payloads in a few texts, where a page for each would take too long. Each has at most so many bytes. */
export function bundles(most) {
  const all = [''];
  for (const payload of payloads) {
    const part = cut(payload, 100);
    if (bytes(all.at(-1)) + 1 + bytes(part) > most) all.push('');
    all.push(`${all.pop()} ${part}`);
  }
  return all;
}
