// Search, filters and the list of questions. Only the visible rows are in the page, so that its size does not grow.

const ROW_HEIGHT = 57, BEYOND = 6;
let shown = []; // rows that match the filters, in order
let current = -1; // the open row

const filters = []; // {key, label, options: [[value, words]], matches(value, row)}
const chosen = {};

const gradeNumber = (name) => Number((name.match(/\d+/) || [99])[0]);

function addFilter(key, label, options, matches) {
  if (options.length) filters.push({ key, label, options, matches });
}

/** A filter for each value of a field of the questions, if there are several. */
function addFieldFilter(key, label, order, words = String) {
  const values = [...new Set(Q.map((question) => question[key]))].filter((value) => value !== undefined).sort(order);
  if (values.length < 2) return;
  addFilter(key, label, values.map((value) => [String(value), words(value)]), (v, row) => String(Q[row][key]) === v);
}

function defineFilters() {
  const asFound = () => 0;
  addFieldFilter('split', 'Split', asFound);
  addFieldFilter('subject', 'Subject', asFound);
  addFieldFilter('grade', 'Grade', (a, b) => gradeNumber(a) - gradeNumber(b));
  addFieldFilter('image', 'Image', (a, b) => b - a, (has) => (has ? 'with image' : 'without image'));
  const answers = main.stages.flatMap((stage, i) => (!stage.answers ? [] : ['right', 'wrong', 'unparsed']
    .map((kind) => [i + kind, `${stage.name}: ${kind}`])));
  addFilter('answer', 'Answer', answers, (v, row) => verdictOf(parseInt(v, 10), row) === v.replace(/^\d+/, ''));
  addFilter('change', 'Change', changeOptions(), (v, row) => {
    const [from, to, sign] = v.split(' ').map(Number);
    return change(from, to, row) === sign;
  });
  const scored = Q.some((_, row) => lowest(row) >= 0);
  addFilter('low', 'Lowest sentence score', scored ? [0, 20, 40, 60, 80].map((v) => [String(v), 'at most ' + asScore(v)]) : [],
    (v, row) => lowest(row) >= 0 && lowest(row) <= Number(v));
  const reasons = [...new Set(Q.flatMap((_, row) => droppedReasons(row)))].sort();
  addFilter('dropped', 'Dropped reply', reasons.length ? [['any', 'any reason'], ...reasons.map((r) => [r, r])] : [],
    (v, row) => (v === 'any' ? droppedReasons(row).length > 0 : droppedReasons(row).includes(v)));
  const models = [...new Set(Object.values(main.sampled).flatMap((known) => known.by))].sort();
  if (models.length > 1) {
    addFilter('by', 'Scored by', models.map((name) => [name, name]), (v, row) => Boolean(main.sampled[row]?.by.includes(v)));
  }
  const compared = Object.values(main.sampled).some((known) => known.apart >= 0);
  addFilter('apart', 'Two Teachers differ', compared ? [10, 20, 30, 50].map((v) => [String(v), 'by ' + asScore(v) + ' or more']) : [],
    (v, row) => (main.sampled[row]?.apart ?? -1) >= Number(v));
  main.verdicts.forEach((result, file) => {
    const preferred = result.systems.map((name, i) => [String(i), name + ' preferred']);
    const options = [...preferred, ['tie', 'tie'], ['mixed', 'depends on the order']];
    addFilter('judged' + file, 'Judge: ' + result.systems.join(' / '), options, (v, row) => String(judged(file, row)) === v);
  });
  if (Object.keys(main.sampled).length || Object.keys(main.corrected).length) {
    addFilter('teacher', 'Teacher', [['s', 'has RL samples'], ['c', 'has a correction']],
      (v, row) => (v === 's' ? row in main.sampled : row in main.corrected));
  }
  if (rowCount > 1) addFilter('sort', 'Order', sortOptions(), () => true);
}

function changeOptions() {
  const options = [];
  for (let from = 0; from < stageCount; from++) {
    for (let to = from + 1; to < stageCount; to++) {
      const [a, b] = [main.stages[from], main.stages[to]];
      if (!((a.answers && b.answers) || (a.rationales && b.rationales))) continue;
      for (const [sign, word] of [[1, 'improved'], [-1, 'worsened']]) options.push([`${from} ${to} ${sign}`, `${a.name} → ${b.name}: ${word}`]);
    }
  }
  return options;
}

function sortOptions() {
  const low = ['low', 'lowest score first'];
  if (main.stages.filter((stage) => stage.rationales).length < 2) return [low];
  return [low, ['gain', 'largest gain, first to last stage'], ['loss', 'largest loss, first to last stage']];
}

function buildFilters() {
  defineFilters();
  const grid = byId('filter-grid');
  for (const filter of filters) {
    const plain = filter.key === 'sort' ? 'as in the files' : 'all';
    const change = () => { chosen[filter.key] = select.value; applyFilters(); };
    const select = el('select', { id: 'filter-' + filter.key, onchange: change },
      el('option', { value: '' }, plain), filter.options.map(([value, words]) => el('option', { value }, words)));
    grid.append(el('label', {}, filter.label, select));
  }
  if (!filters.length) byId('filters').hidden = true;
  byId('search').addEventListener('input', (event) => { chosen.search = event.target.value; applyFilters(); });
  byId('reset').addEventListener('click', resetFilters);
  const list = byId('list');
  list.addEventListener('scroll', () => requestAnimationFrame(drawRows), { passive: true });
  list.addEventListener('click', (event) => {
    const row = event.target.closest('.row');
    if (row) openRow(Number(row.dataset.row));
  });
  new ResizeObserver(drawRows).observe(list);
}

function resetFilters() {
  for (const key of Object.keys(chosen)) delete chosen[key];
  byId('search').value = '';
  for (const filter of filters) byId('filter-' + filter.key).value = '';
  applyFilters();
}

/** Update `shown` and redraw the list; the open question stays open. */
function applyFilters() {
  const active = filters.filter((filter) => filter.key !== 'sort' && chosen[filter.key]);
  const words = (chosen.search || '').toLowerCase().split(/\s+/).filter(Boolean);
  const found = words.length ? searchTexts() : null;
  shown = [...Q.keys()].filter((row) => active.every((filter) => filter.matches(chosen[filter.key], row))
    && words.every((word) => found[row].includes(word)));
  sortShown();
  byId('active').textContent = active.length ? `· ${active.length} on` : '';
  byId('count').textContent = (shown.length === rowCount ? '' : asCount(shown.length) + ' of ') + asCount(rowCount)
    + (rowCount === 1 ? ' question' : ' questions');
  byId('rows').style.height = shown.length * ROW_HEIGHT + 'px';
  byId('list').scrollTop = 0;
  const place = shown.indexOf(current);
  if (place >= 0) scrollToPlace(place);
  drawRows();
}

function sortShown() {
  const how = chosen.sort, rationales = main.stages.flatMap((stage, i) => (stage.rationales ? [i] : []));
  if (!how) return;
  const value = (row) => {
    if (how === 'low') return lowest(row) < 0 ? 1e6 : lowest(row);
    const [first, last] = [rationales[0], rationales.at(-1)].map((stage) => predOf(stage, row).mean);
    return first < 0 || last < 0 ? 1e6 : (last - first) * (how === 'gain' ? -1 : 1);
  };
  const values = new Map(shown.map((row) => [row, value(row)]));
  shown.sort((a, b) => values.get(a) - values.get(b) || a - b);
}

function scrollToPlace(place) {
  const list = byId('list'), top = place * ROW_HEIGHT;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW_HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW_HEIGHT - list.clientHeight;
}

function drawRows() {
  const list = byId('list'), rows = byId('rows');
  if (!list.clientHeight) return; // hidden
  const begin = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - BEYOND);
  const end = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW_HEIGHT) + BEYOND);
  const nodes = [];
  for (let place = begin; place < end; place++) nodes.push(rowNode(place));
  if (!shown.length) nodes.push(el('div', { class: 'empty' }, 'No question matches these filters.'));
  rows.replaceChildren(...nodes);
  if (current >= 0 && shown.includes(current)) list.setAttribute('aria-activedescendant', 'row-' + current);
  else list.removeAttribute('aria-activedescendant');
}

function rowNode(place) {
  const row = shown[place];
  const q = Q[row], facts = [q.qid, q.split, q.grade?.replace('grade', 'grade '), q.subject];
  const node = el('div', {
    class: 'row', role: 'option', id: 'row-' + row, 'data-row': row, 'aria-selected': String(row === current),
    'aria-posinset': place + 1, 'aria-setsize': shown.length,
  }, el('span', { class: 'q' }, q.question || '(no text)'),
    el('span', { class: 'm' }, el('span', {}, facts.filter(Boolean).join(' · ')), stageChips(row)));
  node.style.top = place * ROW_HEIGHT + 'px';
  return node;
}

function stageChips(row) {
  return main.stages.flatMap((stage, i) => {
    const chips = [];
    const mean = predOf(i, row).mean;
    if (stage.rationales && mean >= 0) chips.push(meanChip(mean, `${stage.name}: mean sentence score`));
    const verdict = verdictOf(i, row);
    if (!verdict) return chips;
    const title = `${stage.name}: answer ${verdict}`, sign = { right: '✓', wrong: '✗', unparsed: '?' }[verdict];
    return [...chips, el('span', { class: 'chip blank', title, 'aria-label': `answer ${verdict}` }, sign)];
  });
}
