// The overview: figures per stage, curves, scores by position, replies, cost and time.

const overview = main.overview;

// key, heading, digits, what is better (1 more, -1 less, 0 neither)
const ANSWERS = [['acc_average', 'all', 2, 1], ['acc_natural', 'natural', 2, 1], ['acc_social', 'social', 2, 1],
  ['acc_language', 'language', 2, 1], ['acc_has_text', 'text', 2, 1], ['acc_has_image', 'image', 2, 1],
  ['acc_no_context', 'no context', 2, 1], ['acc_grade_1_6', 'grades 1-6', 2, 1], ['acc_grade_7_12', 'grades 7-12', 2, 1], ['num_fail', 'not read', 0, -1]];
const RATIONALES = [['score', 'sentence score', 3, 1], ['rouge', 'ROUGE‑L', 2, 1],
  ['bleu1', 'BLEU‑1', 2, 1], ['bleu4', 'BLEU‑4', 2, 1],
  ['similarity', 'similarity', 2, 1], ['covered', 'gold covered %', 1, 1], ['repeated', 'repeated %', 1, -1],
  ['concludes', 'right conclusion %', 1, 1], ['no_conclusion', 'no conclusion %', 1, -1],
  ['unfinished', 'unfinished %', 1, -1], ['only_option', 'only option %', 1, -1], ['words', 'words', 1, 0]];

function drawOverview() {
  const cards = [notesCard(), stagesCard(), changesCard(), judgedCard(), roundsCard(), curvesCard(), scoresCard(),
    el('div', { class: 'two' }, repliesCard(), timeCard())];
  byId('overview').replaceChildren(...cards.filter(Boolean));
}

const card = (title, note, ...body) => el('section', { class: 'card' }, el('h2', {}, title),
  note ? el('p', { class: 'small muted' }, note) : null, body);

/** A table; the first `words` columns hold words, the others numbers. */
const tableOf = (heads, rows, words) => el('table', { class: 'full' }, el('thead', {}, el('tr', {},
  heads.map((head, i) => el('th', { scope: 'col', class: i < words ? 'left' : null }, head)))), el('tbody', {}, rows));

/** A table row: its name, then cells, the first `words` of which hold words. */
const lineOf = (name, cells, words) => el('tr', {}, el('th', { scope: 'row' }, name),
  cells.map((cell, i) => (typeof cell === 'string' ? el('td', { class: i < (words || 0) ? 'left' : null }, cell) : cell)));

const wide = (table) => el('div', { class: 'wide' }, table);
const orDash = (value, digits) => (Number.isFinite(value) ? asFixed(value, digits) : '–'); // a mean over nothing

function notesCard() {
  return main.notes.length ? el('ul', { class: 'small muted' }, main.notes.map((note) => el('li', {}, note))) : null;
}

function stagesCard() {
  if (!stageCount) return card('Stages', null, none('predictions (--stage)'));
  const asked = (kind) => main.stages.flatMap((stage, i) => (stage[kind] && overview.figures[i] ? [i] : []));
  return card('Stages', `Split ${overview.split}. Bold: the best stage.`,
    figuresTable('Answers: accuracy in %, by subject, context and grade', asked('answers'), ANSWERS),
    figuresTable('Rationales', asked('rationales'), RATIONALES),
    overview.figures.some((figures) => figures && figures.rationale) ? null : none('sentence scores'));
}

function figuresTable(caption, stages, columns) {
  const valueOf = (stage, key) => {
    const figures = overview.figures[stage];
    return key === 'num_fail' ? figures.num_fail : key in figures.scores ? figures.scores[key] : (figures.rationale || {})[key];
  };
  const used = columns.filter(([key]) => stages.some((stage) => valueOf(stage, key) !== undefined));
  if (!used.length) return null;
  const best = used.map(([key, , digits, better]) => { // of the numbers as shown
    const known = stages.map((stage) => valueOf(stage, key)).filter((value) => value !== undefined)
      .map((value) => better * value.toFixed(digits));
    return better && Math.max(...known) > Math.min(...known) ? Math.max(...known) : null;
  });
  const cell = (stage, [key, , digits, better], i) => {
    const text = orDash(valueOf(stage, key), digits);
    return el('td', { class: text !== '–' && best[i] === better * text ? 'best' : null }, text);
  };
  const rows = stages.map((stage) => lineOf(el('span', { title: main.stages[stage].folder }, main.stages[stage].name),
    [asCount(overview.figures[stage].rows), ...used.map((column, i) => cell(stage, column, i))]));
  const table = tableOf(['stage', 'questions', ...used.map(([, heading]) => heading)], rows, 1);
  table.prepend(el('caption', {}, caption));
  return wide(table);
}

function changesCard() {
  if (!overview.changes.length) return null;
  const heads = ['', 'sentence score', 'right conclusion, points', 'gold covered, points', 'accuracy, points'];
  const rows = overview.changes.map(([name, ...cells]) => lineOf(name, cells.concat(Array(4 - cells.length).fill(''))));
  return card('What each stage changed', 'Differences to the stage before, paired by question, with 95% intervals (bootstrap). '
    + 'The score is the mean over sentences, then over rationales.', wide(tableOf(heads, rows, 1)));
}

function judgedCard() {
  if (!main.verdicts.length) return null;
  const rows = main.verdicts.map((file, i) => {
    const counts = { 0: 0, 1: 0, tie: 0, mixed: 0 };
    for (const row of Object.keys(file.rows)) counts[judged(i, row)]++;
    const words = [file.systems[1], file.judge || '–', overview.judged[i].protocol || '–'].map(String);
    const numbers = [counts[0], counts[1], counts.tie, counts.mixed].map(asCount);
    return lineOf(file.systems[0], [...words, ...numbers, orDash((overview.judged[i].summary || {}).identical, 0)], 3);
  });
  const heads = ['A', 'B', 'judge', 'protocol', 'A preferred', 'B preferred', 'tie', 'depends on the order', 'equal texts (not judged)'];
  return card('Pairwise judge', 'Questions of this report by verdict. The inspector has filters for them.', wide(tableOf(heads, rows, 4)));
}

function roundsCard() {
  if (!overview.rounds.length) return null;
  const percent = (share, digits) => (Number.isFinite(share) ? orDash(100 * share, digits) : '–');
  const rows = overview.rounds.map((line) => lineOf(String(line.round), [asCount(line.rationales || 0), orDash(line.mean_sentence_score, 3),
    orDash(line.reward, 3), orDash(line.length, 1), percent(line.share_ended, 1), percent(line.share_dropped, 2), orDash(line.kl_per_rationale, 3)]));
  const heads = ['round', 'rationales', 'mean sentence score', 'reward per rationale', 'tokens', 'ended %', 'dropped %',
    'KL per rationale, nats'];
  return card('RL samples by round', 'The samples that each round trained on.', wide(tableOf(heads, rows, 0)));
}

function curvesCard() {
  const note = 'Faint: updates; bold: means of the epochs; dotted: start of a round. '
    + 'The samples of a round are fixed, so within a round the reward varies only with the minibatch.';
  if (!overview.curves.length) return card('RL training', null, none('metrics.jsonl (--run)'));
  return card('RL training', note, el('div', { class: 'figures' }, overview.curves.map((name) => el('figure', {}, drawing(name)))));
}

/** A figure that page.py put into a template. */
const drawing = (name) => byId('figure-' + name).content.cloneNode(true);

function scoresCard() {
  if (!overview.series.length) return card('Sentence scores by position', null, none('scores'));
  const judges = (one) => (one.judges.length ? one.judges.join(', ') : 'Teacher unknown');
  const positions = overview.series[0].counts.map((_, i) => i).filter((i) => overview.series.some((one) => one.means[i] !== null));
  const rows = overview.series.map((one) => lineOf(one.name,
    [judges(one), asCount(one.rationales), ...positions.map((i) => orDash(one.means[i], 2))], 1));
  const last = overview.series[0].counts.length - 1;
  const names = positions.map((i) => `sentence ${i + 1}${i === last ? '+' : ''}`);
  const heads = ['rationales of', 'scored by', 'rationales', ...names];
  return card('Sentence scores by position', 'Share of sentences with each score, by position in the rationale.', scaleLegend(),
    el('div', { class: 'scores' }, drawing('scores')), fold('Means as a table', () => wide(tableOf(heads, rows, 2))));
}

function repliesCard() {
  if (!overview.costs.length) return card('Teacher: replies and cost', null, none('replies (--run, --correction_dir)'));
  const dollars = (one) => (one.usd === null ? 'unknown' : !one.usd ? '$0' : '$' + one.usd.toFixed(one.usd < 1 ? 4 : 2));
  const rows = overview.costs.map((one) => lineOf(one.name,
    [...[one.replies, one.asked, one.tokens_in, one.tokens_out].map(asCount), dollars(one)]));
  const models = [...new Set(overview.costs.flatMap((one) => one.models))].join(', ');
  const dropped = overview.dropped.map((one) => {
    const words = Object.entries(one.reasons).map(([reason, count]) => `${reason} ${count}`).join(', ');
    const found = words ? `dropped of ${asCount(one.total)}: ${words}` : `all ${asCount(one.total)} replies could be used`;
    return el('p', { class: 'small' }, `${one.name}: ${found}`);
  });
  const unknown = overview.costs.reduce((sum, one) => sum + one.unknown_usd, 0);
  return card('Teacher: replies and cost', models ? `Model: ${models}.` : null,
    wide(tableOf(['for', 'replies', 'asked', 'tokens in', 'tokens out', 'cost'], rows, 1)),
    unknown ? el('p', { class: 'small' }, `up to $${unknown.toFixed(4)} more for requests whose outcome is unknown`) : null,
    dropped);
}

function timeCard() {
  const spans = overview.costs.filter((one) => one.began && one.ended !== one.began).map((one) => ({
    name: `Teacher: ${one.name}, first to last reply`, seconds: (new Date(one.ended) - new Date(one.began)) / 1000 }));
  const known = [...overview.times, ...spans];
  if (!known.length) return card('Time', null, none('wall time (--times)'));
  const rows = known.map((one) => lineOf(one.name, [asTime(one.seconds)]));
  return card('Time', null, wide(tableOf(['stage', 'wall time'], rows, 1)));
}
