// The detail view of one question: the question, each stage's output, the Teacher's replies.

let showTokens = false;

/** The open question; if none is open, the words `instead`. */
function drawDetail(instead = rowCount ? 'Choose a question.' : 'This report holds no question.') {
  const box = byId('detail');
  const parts = [headNode, questionNode, optionsNode, stagesPart, judgePart, goldPart, samplesPart, correctionPart];
  if (current >= 0) box.replaceChildren(...parts.map((make) => make(current)).filter(Boolean));
  else box.replaceChildren(el('p', { class: 'empty' }, instead));
  box.scrollTop = 0;
}

function headNode(row) {
  const place = shown.indexOf(row), atEnd = place >= 0 && place === shown.length - 1;
  const where = place < 0 ? 'outside the filters' : `${asCount(place + 1)} of ${asCount(shown.length)}`;
  const q = Q[row], facts = [q.split, q.subject, q.topic, q.grade?.replace('grade', 'grade ')].filter(Boolean);
  return el('div', { class: 'head' },
    el('div', {}, el('strong', {}, 'Question ' + q.qid), facts.map((fact) => el('span', { class: 'tag' }, fact))),
    el('div', {}, el('span', { class: 'num' }, where),
      el('button', { id: 'previous', 'aria-keyshortcuts': 'k', disabled: place === 0, onclick: () => move(-1) }, '← Previous'),
      el('button', { id: 'next', 'aria-keyshortcuts': 'j', disabled: atEnd, onclick: () => move(1) }, 'Next →'),
      el('a', { href: '#qid=' + encodeURIComponent(q.qid) }, 'Link')));
}

function questionNode(row) {
  const q = Q[row];
  const context = [['Hint', q.hint], ['Caption', q.caption]]
    .map(([name, text]) => (text ? el('p', { class: 'context' }, el('b', {}, name), text) : null));
  return el('div', { class: 'question' }, el('div', {}, el('h2', {}, q.question || '(no text)'), context), picturesNode(row));
}

function picturesNode(row) {
  const pictures = imagesOf(row);
  if (pictures.length) {
    return el('div', { class: 'pictures' }, pictures.map((one, i) => el('img', {
      src: one.src, width: Math.min(one.w, 300), height: Math.round(one.h * Math.min(1, 300 / one.w)),
      alt: i ? `Image ${i + 1} of the question` : 'Image of the question',
    })));
  }
  if (!Q[row].image) return null;
  return el('div', { class: 'pictures' }, el('p', { class: 'absent' }, 'This question has an image, which is not in this report.'));
}

function optionsNode(row) {
  if (!Q[row].choices.length) return null;
  return el('ul', { class: 'options', 'aria-label': 'Options' }, Q[row].choices.map((choice, i) => {
    const gold = Q[row].answer === i;
    const by = main.stages.filter((_, stage) => predOf(stage, row).a === i).map((stage) => stage.name);
    const letter = el('span', { class: 'letter' }, `(${main.letters[i]})`);
    return el('li', { class: gold ? 'gold' : null }, letter, el('span', {}, choice),
      el('span', { class: 'by' }, gold ? '✓ gold' : null, gold && by.length ? ' · ' : null,
        by.length ? `${gold ? '' : '✗ '}predicted by ${by.join(', ')}` : null));
  }));
}

// -- rationales --------------------------------------------------------------------------------------------

/** Sentences, each on the colour of its score and followed by it; search words are highlighted. */
function sentencesNode(sentences, scores, advantages) {
  if (!sentences.length) return el('div', { class: 'text none' }, 'empty');
  const words = (chosen.search || '').toLowerCase().split(/\s+/).filter((word) => word.length > 1);
  return el('div', { class: 'text' }, sentences.map((sentence, i) => {
    const score = scores ? scores[i] : null;
    const number = score === null ? null : el('span', { class: 'n' }, asScore(score));
    const advantage = !advantages || !showTokens ? null
      : el('span', { class: 'n', title: 'advantage of its last token' }, 'adv ' + asSigned(advantages[i] / 1000, 2));
    const colour = score === null ? '' : ' ' + step(score);
    return [i ? ' ' : null, el('span', { class: 'sent' + colour }, marked(sentence, words), number, advantage)];
  }));
}

/** The text, with the words that are searched for highlighted. */
function marked(text, words) {
  if (!words.length) return text;
  const either = words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, '\\$&')).join('|');
  return text.split(new RegExp(`(${either})`, 'i')).map((piece, i) => (i % 2 ? el('mark', {}, piece) : piece));
}

function stageLine(name, note, body, mean) {
  return el('div', { class: 'stage' }, el('h3', {}, name, note ? el('small', {}, note) : null), el('div', {}, body),
    el('div', { class: 'mean' }, mean >= 0 ? meanChip(mean, 'mean sentence score') : null));
}

/** A section with a heading, and what stands beside the heading. */
const part = (title, beside, ...body) => el('section', { class: 'part' },
  el('div', { class: 'line' }, el('h2', {}, title), beside), body);

function stagesPart(row) {
  if (!stageCount) return null;
  return part('Stages', scaleLegend(), main.stages.map((stage, i) => {
    const pred = predOf(i, row);
    if (!pred.s) return stageLine(stage.name, null, el('div', { class: 'text none' }, 'no prediction of this question'), -1);
    const body = [stage.rationales ? sentencesNode(pred.s, pred.p) : null, answerNode(i, row)];
    if (!stage.rationales) body.push(el('div', { class: 'text plain muted' }, pred.w));
    else if (pred.w) body.push(fold('as the model wrote it', () => el('div', { class: 'raw' }, pred.w)));
    return stageLine(stage.name, null, body, pred.mean);
  }));
}

function answerNode(stage, row) {
  const verdict = verdictOf(stage, row), answer = predOf(stage, row).a;
  if (!verdict) return null;
  const words = { right: '✓ right', wrong: '✗ wrong', unparsed: '? no answer could be read' }[verdict];
  const chosenOption = verdict === 'unparsed' ? '' : `(${main.letters[answer]}) ${Q[row].choices[answer] || ''} · `;
  return el('div', { class: 'text' }, chosenOption + words);
}

function goldPart(row) {
  const body = [['Solution', Q[row].solution], ['Lecture', Q[row].lecture]].filter(([, text]) => text).map(([name, text]) => (
    el('div', { class: 'stage' }, el('h3', {}, name), el('div', { class: 'text plain' }, text), el('div'))));
  return body.length ? part('Gold', null, body) : null;
}

function judgePart(row) {
  const lines = main.verdicts.flatMap((result) => {
    const verdicts = result.rows[row];
    if (!verdicts) return [];
    const [a, b] = result.systems;
    const words = verdicts.map(([order, winner]) => {
      const found = winner === 'tie' ? 'tie' : (winner === 'a' ? a : b) + ' preferred';
      return el('div', { class: 'text' }, `${order === 'ab' ? a : b} first: `, el('b', {}, found));
    });
    return [stageLine(`${a} / ${b}`, result.judge, words, -1)];
  });
  return lines.length ? part('Judge', null, lines) : null;
}

// -- the Teacher -------------------------------------------------------------------------------------------

function samplesPart(row) {
  const samples = row in main.sampled ? details().samples[row] : null;
  if (!samples) return null;
  const toggle = el('button', { 'aria-pressed': String(showTokens), 'aria-keyshortcuts': 't', onclick: toggleTokens },
    showTokens ? 'Hide rewards and advantages' : 'Rewards and advantages');
  const node = part('RL samples', [toggle, scaleLegend()], samples.map(sampleNode));
  node.id = 'samples';
  return node;
}

function sampleNode(sample) {
  const note = [main.rounds.length > 1 ? `round ${sample.round}` : null,
    sample.reward === undefined ? null : 'reward ' + asSigned(sample.reward / 1000, 2)].filter(Boolean).join(' · ');
  const second = sample.p2 ? [el('p', { class: 'small muted' }, `by ${sample.by2}`), sentencesNode(sample.s, sample.p2)] : null;
  const body = [sentencesNode(sample.s, sample.p, sample.adv), second, whyNode(sample), showTokens ? tokensNode(sample) : null, replyNode(sample)];
  return stageLine(`Sample ${sample.k}`, note, body, meanOf(sample.p));
}

const whyNode = (reply) => (reply.reason ? el('p', { class: 'why' }, el('b', {}, 'dropped: '), reply.why) : null);

function replyNode(reply) {
  if (reply.reply === undefined && reply.about === undefined) return null;
  return fold("Teacher's reply", () => el('div', {},
    reply.about ? el('p', { class: 'muted' }, reply.about) : null, el('div', { class: 'raw' }, reply.reply ?? 'none')));
}

function tokensNode(sample) {
  if (!sample.tokens) return el('p', { class: 'none small' }, 'token rewards: not available');
  const most = Math.max(1, ...sample.advantages.map(Math.abs));
  const nodes = sample.tokens.map((piece, t) => {
    const advantage = sample.advantages[t], reward = sample.rewards[t];
    return el('span', { class: 'tok' }, el('span', {}, piece),
      el('i', {}, reward ? asSigned(reward / 1000, 2) : '·'),
      el('i', { class: step(50 + (50 * advantage) / most) }, asSigned(advantage / 1000, 2)));
  });
  const legend = 'token · reward · advantage (before whitening, coloured by size within this sample)';
  return el('div', {}, el('p', { class: 'small muted' }, legend), el('div', { class: 'tokens' }, nodes));
}

function toggleTokens() {
  showTokens = !showTokens;
  const part = byId('samples'), box = byId('detail'), top = box.scrollTop;
  if (!part) return;
  const again = samplesPart(current);
  part.replaceWith(again);
  box.scrollTop = top;
  again.querySelector('button').focus({ preventScroll: true });
}

function correctionPart(row) {
  const correction = row in main.corrected ? details().corrections[row] : null;
  if (!correction) return null;
  const pieces = correction.diff || [['same', correction.original]];
  const words = pieces.map(([kind, text], i) => [i ? ' ' : null, kind === 'same' ? text : el(kind, {}, text)]);
  const unchanged = correction.diff && pieces.every(([kind]) => kind === 'same');
  const body = [el('div', { class: 'text' }, words), unchanged ? el('p', { class: 'small muted' }, 'unchanged') : null];
  return part('Correction', el('span', { class: 'small muted' }, el('del', {}, 'removed'), ' ', el('ins', {}, 'added')),
    stageLine('Original → final', null, [...body, whyNode(correction), replyNode(correction)], -1));
}
