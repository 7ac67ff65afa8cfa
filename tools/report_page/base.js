// Small helpers. Text reaches the page through text nodes only: nothing here, or above it, ever parses a string as HTML.

const byId = (id) => document.getElementById(id);

/** An element. `props`: attributes, or listeners ("onclick"); `children`: nodes, texts, null for nothing, or lists of these. */
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

/** A number in hundredths as a score: 0.7, 0.75. */
const asScore = (hundredths) => (hundredths % 10 ? (hundredths / 100).toFixed(2) : (hundredths / 100).toFixed(1));
/** A number with that many digits; no sign before a zero. */
const asFixed = (value, digits) => value.toFixed(digits).replace(/^-(?=[0.]+$)/, '');
const asSigned = (value, digits) => {
  const text = asFixed(value, digits);
  return Number(text) > 0 ? '+' + text : text.replace('-', '−');
};
const asCount = (value) => value.toLocaleString('en-US');
/** The step of the colour scale for a score in hundredths. */
const step = (hundredths) => 's' + Math.max(0, Math.min(10, Math.round(hundredths / 10)));

function asTime(seconds) {
  if (seconds < 100) return seconds.toFixed(seconds < 10 ? 1 : 0) + ' s';
  if (seconds < 6000) return (seconds / 60).toFixed(1) + ' min';
  return (seconds / 3600).toFixed(1) + ' h';
}

/** A mean score, in hundredths, on its colour. */
const meanChip = (mean, title) => el('span', { class: 'chip ' + step(mean), title }, (mean / 100).toFixed(2));

const none = (what) => el('p', { class: 'none small' }, what + ': not available');

/** Orange to blue, with its ends named. */
function scaleLegend() {
  const steps = Array.from({ length: 11 }, (_, i) => el('i', { class: 's' + i }));
  return el('div', { class: 'scale' }, 'score 0', el('span', { 'aria-hidden': 'true' }, steps), '1');
}

function fold(summary, body, open) {
  const node = el('details', { class: 'fold', open: open || null }, el('summary', {}, summary));
  const fill = () => { if (node.open && node.childElementCount === 1) node.append(body()); };
  node.addEventListener('toggle', fill); // built when first looked at
  fill();
  return node;
}
