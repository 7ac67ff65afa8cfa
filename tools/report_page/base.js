// Helpers. Text reaches the page through text nodes only; no script of this page parses a string as HTML.

const byId = (id) => document.getElementById(id);

/** An element. `props`: attributes and listeners ("onclick"); `children`: nodes, texts, null (skipped), or lists of these. */
function el(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'class') node.className = value;
    else node.setAttribute(name, value === true ? '' : value);
  }
  for (const child of children.flat(9)) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}

const parsed = (id) => JSON.parse(byId(id).textContent);

/** Hundredths as a score: 0.7, 0.75. */
const asScore = (hundredths) => (hundredths % 10 ? (hundredths / 100).toFixed(2) : (hundredths / 100).toFixed(1));
/** A number with so many decimals, without a sign before a zero. */
const asFixed = (value, digits) => value.toFixed(digits).replace(/^-(?=[0.]+$)/, '');
const asSigned = (value, digits) => {
  const text = asFixed(value, digits);
  return Number(text) > 0 ? '+' + text : text.replace('-', '−');
};
const asCount = (value) => value.toLocaleString('en-US');
/** CSS class of a score in hundredths: its step of the colour scale. */
const step = (hundredths) => 's' + Math.max(0, Math.min(10, Math.round(hundredths / 10)));

function asTime(seconds) {
  if (seconds < 100) return seconds.toFixed(seconds < 10 ? 1 : 0) + ' s';
  if (seconds < 6000) return (seconds / 60).toFixed(1) + ' min';
  return (seconds / 3600).toFixed(1) + ' h';
}

/** A mean score, in hundredths, on the colour of its step. */
const meanChip = (mean, title) => el('span', { class: 'chip ' + step(mean), title }, (mean / 100).toFixed(2));

const none = (what) => el('p', { class: 'none small' }, what + ': not available');

/** The colour scale with both ends labelled. */
function scaleLegend() {
  const steps = Array.from({ length: 11 }, (_, i) => el('i', { class: 's' + i }));
  return el('div', { class: 'scale' }, 'score 0', el('span', { 'aria-hidden': 'true' }, steps), '1');
}

/** A closed section; `body` makes its content when it is first opened. */
function fold(summary, body) {
  const node = el('details', { class: 'fold' }, el('summary', {}, summary));
  node.addEventListener('toggle', () => { if (node.open && node.childElementCount === 1) node.append(body()); });
  return node;
}
