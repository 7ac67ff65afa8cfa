// The first tab: figures per stage, curves, scores by position, replies, cost and time.

// key, heading, digits, which is better (1 more, -1 less, 0 neither)
const ANSWERS = [['acc_average', 'all', 2, 1], ['acc_natural', 'natural', 2, 1], ['acc_social', 'social', 2, 1],
  ['acc_language', 'language', 2, 1], ['acc_has_text', 'text', 2, 1], ['acc_has_image', 'image', 2, 1],
  ['acc_no_context', 'no context', 2, 1], ['acc_grade_1_6', 'grades 1-6', 2, 1], ['acc_grade_7_12', 'grades 7-12', 2, 1], ['num_fail', 'not read', 0, -1]];
const RATIONALES = [['score', 'sentence score', 3, 1], ['rouge', 'ROUGE‑L', 2, 1],
  ['bleu1', 'BLEU‑1', 2, 1], ['bleu4', 'BLEU‑4', 2, 1],
  ['similarity', 'similarity', 2, 1], ['covered', 'gold covered %', 1, 1], ['repeated', 'repeated %', 1, -1],
  ['unfinished', 'unfinished %', 1, -1], ['only_option', 'only option %', 1, -1], ['words', 'words', 1, 0]];

function drawOverview() {
  const told = main.overview;
  const cards = [notesCard(), stagesCard(told), judgedCard(told), roundsCard(told), curvesCard(told), scoresCard(told),
    el('div', { class: 'two' }, repliesCard(told), timeCard(told))];
  byId('overview').replaceChildren(...cards.filter(Boolean));
}

const card = (title, note, ...body) => el('section', { class: 'card' }, el('h2', {}, title),
  note ? el('p', { class: 'small muted' }, note) : null, body);

/** A table with its headings; the first `texts` columns hold words, the others numbers. */
const tableOf = (heads, rows, texts) => el('table', { class: 'full' }, el('thead', {}, el('tr', {},
  heads.map((head, i) => el('th', { scope: 'col', class: i < texts ? 'left' : null }, head)))), el('tbody', {}, rows));

/** A line of a table: its name, then cells; `words`: how many of the cells hold words. */
const lineOf = (name, cells, words) => el('tr', {}, el('th', { scope: 'row' }, name),
  cells.map((cell, i) => (typeof cell === 'string' ? el('td', { class: i < (words || 0) ? 'left' : null }, cell) : cell)));

const wide = (table) => el('div', { class: 'wide' }, table);
const orDash = (value, digits) => (Number.isFinite(value) ? asFixed(value, digits) : '–'); // no mean over nothing

function notesCard() {
  return main.notes.length ? el('ul', { class: 'small muted' }, main.notes.map((note) => el('li', {}, note))) : null;
}

function stagesCard(told) {
  if (!stageCount) return card('Stages', null, none('predictions (--stage)'));
  const asked = (kind) => main.stages.flatMap((stage, i) => (stage[kind] && told.figures[i] ? [i] : []));
  return card('Stages', `Split ${told.split}. Bold: the best stage.`,
    figuresTable(told, 'Answers: accuracy in %, by subject, context and grade', asked('answers'), ANSWERS),
    figuresTable(told, 'Rationales', asked('rationales'), RATIONALES),
    told.figures.some((figures) => figures && figures.rationale) ? null : none('sentence scores'));
}

function figuresTable(told, caption, stages, columns) {
  const valueOf = (stage, key) => {
    const figures = told.figures[stage];
    return key === 'num_fail' ? figures.num_fail : key in figures.scores ? figures.scores[key] : (figures.rationale || {})[key];
  };
  const used = columns.filter(([key]) => stages.some((stage) => valueOf(stage, key) !== undefined));
  if (!used.length) return null;
  const best = used.map(([key, , digits, better]) => { // among the numbers as they are shown
    const known = stages.map((stage) => valueOf(stage, key)).filter((value) => value !== undefined)
      .map((value) => better * value.toFixed(digits));
    return better && Math.max(...known) > Math.min(...known) ? Math.max(...known) : null;
  });
  const cell = (stage, [key, , digits, better], i) => {
    const text = orDash(valueOf(stage, key), digits);
    return el('td', { class: text !== '–' && best[i] === better * text ? 'best' : null }, text);
  };
  const rows = stages.map((stage) => lineOf(el('span', { title: main.stages[stage].folder }, main.stages[stage].name),
    [asCount(told.figures[stage].rows), ...used.map((column, i) => cell(stage, column, i))]));
  const table = tableOf(['stage', 'questions', ...used.map(([, heading]) => heading)], rows, 1);
  table.prepend(el('caption', {}, caption));
  return wide(table);
}

function judgedCard(told) {
  if (!main.verdicts.length) return null;
  const rows = main.verdicts.map((file, i) => {
    const counts = { 0: 0, 1: 0, tie: 0, mixed: 0 };
    for (const row of Object.keys(file.rows)) counts[judged(i, row)]++;
    const words = [file.systems[1], file.judge || '–', told.judged[i].protocol || '–'].map(String);
    const numbers = [counts[0], counts[1], counts.tie, counts.mixed].map(asCount);
    return lineOf(file.systems[0], [...words, ...numbers, orDash((told.judged[i].summary || {}).identical, 0)], 3);
  });
  const heads = ['A', 'B', 'judge', 'protocol', 'A preferred', 'B preferred', 'tie', 'depends on the order', 'equal texts, not asked'];
  return card('Pairwise judge', 'Questions of this report by verdict; filter for them in the inspector.', wide(tableOf(heads, rows, 4)));
}

function roundsCard(told) {
  if (!told.rounds.length) return null;
  const percent = (share, digits) => (Number.isFinite(share) ? orDash(100 * share, digits) : '–');
  const rows = told.rounds.map((line) => lineOf(String(line.round), [asCount(line.rationales || 0), orDash(line.mean_sentence_score, 3),
    orDash(line.reward, 3), orDash(line.length, 1), percent(line.share_ended, 1), percent(line.share_dropped, 2), orDash(line.kl_per_rationale, 3)]));
  const heads = ['round', 'rationales', 'mean sentence score', 'reward per rationale', 'tokens', 'ended %', 'dropped %',
    'KL per rationale, nats'];
  return card('RL samples by round', 'What each round was trained on.', wide(tableOf(heads, rows, 0)));
}

function curvesCard(told) {
  const note = 'Faint: single updates; bold: means of the epochs; dotted: a new round. '
    + 'Samples are fixed within a round: its reward moves only with the minibatch.';
  if (!told.curves.length) return card('RL training', null, none('metrics.jsonl (--run)'));
  return card('RL training', note, el('div', { class: 'figures' }, told.curves.map((name) => el('figure', {}, drawing(name)))));
}

/** Our own drawing, laid down in a template by page.py. */
const drawing = (name) => byId('figure-' + name).content.cloneNode(true);

function scoresCard(told) {
  if (!told.series.length) return card('Sentence scores by position', null, none('scores'));
  const judges = (one) => (one.judges.length ? one.judges.join(', ') : 'Teacher unknown');
  const positions = told.series[0].counts.map((_, i) => i).filter((i) => told.series.some((one) => one.means[i] !== null));
  const rows = told.series.map((one) => lineOf(one.name,
    [judges(one), asCount(one.rationales), ...positions.map((i) => orDash(one.means[i], 2))], 1));
  const last = told.series[0].counts.length - 1;
  const names = positions.map((i) => `sentence ${i + 1}${i === last ? '+' : ''}`);
  const heads = ['rationales of', 'scored by', 'rationales', ...names];
  return card('Sentence scores by position', 'Share of sentences with each score; the first sentence on top.', scaleLegend(),
    el('div', { class: 'scores' }, drawing('scores')), fold('Means as a table', () => wide(tableOf(heads, rows, 2))));
}

function repliesCard(told) {
  if (!told.costs.length) return card('Teacher: replies and cost', null, none('replies (--run, --correction_dir)'));
  const dollars = (one) => (one.usd === null ? 'unknown' : !one.usd ? '$0' : '$' + one.usd.toFixed(one.usd < 1 ? 4 : 2));
  const rows = told.costs.map((one) => lineOf(one.name,
    [...[one.replies, one.asked, one.tokens_in, one.tokens_out].map(asCount), dollars(one)]));
  const models = [...new Set(told.costs.flatMap((one) => one.models))].join(', ');
  const dropped = told.dropped.map((one) => {
    const words = Object.entries(one.reasons).map(([reason, count]) => `${reason} ${count}`).join(', ');
    const found = words ? `dropped of ${asCount(one.total)}: ${words}` : `all ${asCount(one.total)} replies could be used`;
    return el('p', { class: 'small' }, `${one.name}: ${found}`);
  });
  const unknown = told.costs.reduce((sum, one) => sum + one.unknown_usd, 0);
  return card('Teacher: replies and cost', models ? `Model: ${models}.` : null,
    wide(tableOf(['for', 'replies', 'asked', 'tokens in', 'tokens out', 'cost'], rows, 1)),
    unknown ? el('p', { class: 'small' }, `at most $${unknown.toFixed(4)} besides, for requests whose fate is unknown`) : null,
    dropped);
}

function timeCard(told) {
  const spans = told.costs.filter((one) => one.began && one.ended !== one.began).map((one) => ({
    name: `Teacher: ${one.name}, first to last reply`, seconds: (new Date(one.ended) - new Date(one.began)) / 1000 }));
  const known = [...told.times, ...spans];
  if (!known.length) return card('Time', null, none('wall time (--times)'));
  const rows = known.map((one) => lineOf(one.name, [asTime(one.seconds)]));
  return card('Time', null, wide(tableOf(['stage', 'wall time'], rows, 1)));
}
