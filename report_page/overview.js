// The first tab: figures per stage, curves, scores by position, replies, cost and time.

// key, heading, digits, which is better (1 more, -1 less, 0 neither)
const ANSWERS = [['acc_average', 'all', 2, 1], ['acc_natural', 'natural', 2, 1], ['acc_social', 'social', 2, 1],
  ['acc_language', 'language', 2, 1], ['acc_has_text', 'text', 2, 1], ['acc_has_image', 'image', 2, 1], ['acc_no_context', 'no context', 2, 1],
  ['acc_grade_1_6', 'grades 1-6', 2, 1], ['acc_grade_7_12', 'grades 7-12', 2, 1], ['num_fail', 'not read', 0, -1]];
const RATIONALES = [['score', 'sentence score', 3, 1], ['rouge', 'ROUGE‑L', 2, 1], ['bleu1', 'BLEU‑1', 2, 1], ['bleu4', 'BLEU‑4', 2, 1],
  ['similarity', 'similarity', 2, 1], ['covered', 'gold covered %', 1, 1], ['repeated', 'repeated %', 1, -1],
  ['unfinished', 'unfinished %', 1, -1], ['only_option', 'only option %', 1, -1], ['words', 'words', 1, 0]];

function drawOverview() {
  const told = main.overview;
  byId('overview').replaceChildren(...[notesCard(), stagesCard(told), judgedCard(told), roundsCard(told), curvesCard(told), scoresCard(told),
    el('div', { class: 'two' }, repliesCard(told), timeCard(told))].filter(Boolean));
}

const card = (title, note, ...body) => el('section', { class: 'card' }, el('h2', {}, title), note ? el('p', { class: 'small muted' }, note) : null, body);

function notesCard() {
  return main.notes.length ? el('ul', { class: 'small muted' }, main.notes.map((note) => el('li', {}, note))) : null;
}

function stagesCard(told) {
  if (!stageCount) return card('Stages', null, none('predictions (--stage)'));
  const tables = [['Answers: accuracy in %, by subject, context and grade', 'answers', ANSWERS], ['Rationales', 'rationales', RATIONALES]]
    .map(([caption, kind, columns]) => figuresTable(told, caption, main.stages.flatMap((stage, i) => (stage[kind] && told.figures[i] ? [i] : [])), columns));
  return card('Stages', `Split ${told.split}. Bold: the best stage.`, tables,
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
  const rows = stages.map((stage) => el('tr', {}, el('th', { scope: 'row', title: main.stages[stage].folder }, main.stages[stage].name),
    el('td', {}, asCount(told.figures[stage].rows)), used.map(([key, , digits, better], i) => {
      const value = valueOf(stage, key);
      return el('td', { class: value !== undefined && best[i] === better * value.toFixed(digits) ? 'best' : null }, value === undefined ? '–' : value.toFixed(digits));
    })));
  const table = tableOf(['stage', 'questions', ...used.map(([, heading]) => heading)], rows, 1);
  table.prepend(el('caption', {}, caption));
  return el('div', { class: 'wide' }, table);
}

function judgedCard(told) {
  if (!main.verdicts.length) return null;
  const rows = main.verdicts.map((file, i) => {
    const counts = { 0: 0, 1: 0, tie: 0, mixed: 0 };
    for (const row of Object.keys(file.rows)) counts[judged(i, row)]++;
    const cells = [file.systems[0], file.systems[1], file.judge || '–', told.judged[i].protocol || '–'];
    return el('tr', {}, cells.map((text, c) => el(c ? 'td' : 'th', c ? { class: 'left' } : { scope: 'row' }, String(text))),
      [counts[0], counts[1], counts.tie, counts.mixed].map((count) => el('td', {}, asCount(count))));
  });
  const heads = ['A', 'B', 'judge', 'protocol', 'A preferred', 'B preferred', 'tie', 'depends on the order'];
  return card('Pairwise judge', 'Questions of this report by verdict; filter for them in the inspector.',
    el('div', { class: 'wide' }, tableOf(heads, rows, 4)));
}

const tableOf = (heads, rows, texts) => el('table', { class: 'full' }, el('thead', {}, el('tr', {},
  heads.map((head, i) => el('th', { scope: 'col', class: i < texts ? 'left' : null }, head)))), el('tbody', {}, rows));

function roundsCard(told) {
  if (!told.rounds.length) return null;
  const show = (value, digits, times) => (Number.isFinite(value) ? (value * (times || 1)).toFixed(digits) : '–'); // null: no mean
  const rows = told.rounds.map((line) => el('tr', {}, el('th', { scope: 'row' }, String(line.round)),
    [asCount(line.rationales || 0), show(line.mean_sentence_score, 3), show(line.reward, 3), show(line.length, 1),
      show(line.share_ended, 1, 100), show(line.share_dropped, 2, 100), show(line.kl_per_rationale, 3)].map((text) => el('td', {}, text))));
  const heads = ['round', 'rationales', 'mean sentence score', 'reward per rationale', 'tokens', 'ended %', 'dropped %', 'KL per rationale, nats'];
  return card('RL samples by round', 'What each round was trained on.', el('div', { class: 'wide' }, tableOf(heads, rows, 0)));
}

function curvesCard(told) {
  const note = 'Faint: single updates; bold: means of the epochs; dotted: a new round. Samples are fixed within a round: its reward moves only with the minibatch.';
  if (!told.curves.length) return card('RL training', null, none('metrics.jsonl (--run)'));
  return card('RL training', note, el('div', { class: 'figures' }, told.curves.map((name) => el('figure', {}, drawing(name)))));
}

/** Our own drawing, laid down in a template by page.py. */
const drawing = (name) => byId('figure-' + name).content.cloneNode(true);

function scoresCard(told) {
  if (!told.series.length) return card('Sentence scores by position', null, none('scores'));
  const judges = (one) => (one.judges.length ? one.judges.join(', ') : 'Teacher unknown');
  const positions = told.series[0].counts.map((_, i) => i).filter((i) => told.series.some((one) => one.means[i] !== null));
  const rows = told.series.map((one) => el('tr', {}, el('th', { scope: 'row' }, one.name), el('td', { class: 'left' }, judges(one)),
    el('td', {}, asCount(one.rationales)), positions.map((i) => el('td', {}, one.means[i] === null ? '–' : one.means[i].toFixed(2)))));
  const last = told.series[0].counts.length - 1;
  const heads = ['rationales of', 'scored by', 'rationales', ...positions.map((i) => `sentence ${i + 1}${i === last ? '+' : ''}`)];
  return card('Sentence scores by position', 'Share of sentences with each score; the first sentence on top.', scaleLegend(),
    el('div', { class: 'scores' }, drawing('scores')), fold('Means as a table', () => el('div', { class: 'wide' }, tableOf(heads, rows, 2))));
}

function repliesCard(told) {
  if (!told.costs.length) return card('Teacher: replies and cost', null, none('replies (--run, --correction_dir)'));
  const dollars = (one) => (one.usd === null ? 'unknown' : !one.usd ? '$0' : '$' + one.usd.toFixed(one.usd < 1 ? 4 : 2));
  const rows = told.costs.map((one) => el('tr', {}, el('th', { scope: 'row' }, one.name), el('td', {}, asCount(one.replies)), el('td', {}, asCount(one.asked)),
    el('td', {}, asCount(one.tokens_in)), el('td', {}, asCount(one.tokens_out)), el('td', {}, dollars(one))));
  const models = [...new Set(told.costs.flatMap((one) => one.models))].join(', ');
  const dropped = told.dropped.map((one) => {
    const words = Object.entries(one.reasons).map(([reason, count]) => `${reason} ${count}`).join(', ');
    return el('p', { class: 'small' }, `${one.name}: ${words ? `dropped of ${asCount(one.total)}: ${words}` : `all ${asCount(one.total)} replies could be used`}`);
  });
  const unknown = told.costs.reduce((sum, one) => sum + one.unknown_usd, 0);
  return card('Teacher: replies and cost', models ? `Model: ${models}.` : null,
    el('div', { class: 'wide' }, tableOf(['for', 'replies', 'asked', 'tokens in', 'tokens out', 'cost'], rows, 1)),
    unknown ? el('p', { class: 'small' }, `besides, at most $${unknown.toFixed(4)} for requests whose fate is unknown`) : null, dropped);
}

function timeCard(told) {
  const spans = told.costs.filter((one) => one.began && one.ended !== one.began).map((one) => ({
    name: `Teacher: ${one.name}, first to last reply`, seconds: (new Date(one.ended) - new Date(one.began)) / 1000 }));
  const known = [...told.times, ...spans];
  if (!known.length) return card('Time', null, none('wall time (--times)'));
  const rows = known.map((one) => el('tr', {}, el('th', { scope: 'row' }, one.name), el('td', {}, asTime(one.seconds))));
  return card('Time', null, el('div', { class: 'wide' }, tableOf(['stage', 'wall time'], rows, 1)));
}
