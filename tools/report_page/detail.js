// The detail view of one question: the question, each stage's output, the Teacher's replies.

let showTokens = false;

function drawDetail() {
  const box = byId('detail');
  if (current < 0) {
    box.replaceChildren(el('p', { class: 'empty' }, rowCount ? 'Choose a question.' : 'This report holds no question.'));
    return;
  }
  const row = current;
  box.replaceChildren(...[headNode(row), questionNode(row), optionsNode(row), stagesPart(row), judgePart(row), goldPart(row),
    samplesPart(row), correctionPart(row)].filter(Boolean));
  box.scrollTop = 0;
}

function drawMissing(qid) {
  byId('detail').replaceChildren(el('p', { class: 'empty' }, `Question ${qid} is not in this report.`));
}

function headNode(row) {
  const place = shown.indexOf(row), atEnd = place >= 0 && place === shown.length - 1;
  const where = place < 0 ? 'outside the filters' : `${asCount(place + 1)} of ${asCount(shown.length)}`;
  const facts = [Q.split[row], T(Q.subject[row]), T(Q.topic[row]), T(Q.grade[row]).replace('grade', 'grade ')].filter(Boolean);
  return el('div', { class: 'head' },
    el('div', {}, el('strong', {}, 'Question ' + Q.qid[row]), facts.map((fact) => el('span', { class: 'tag' }, fact))),
    el('div', {}, el('span', { class: 'num' }, where),
      el('button', { id: 'previous', 'aria-keyshortcuts': 'k', disabled: place === 0, onclick: () => move(-1) }, '← Previous'),
      el('button', { id: 'next', 'aria-keyshortcuts': 'j', disabled: atEnd, onclick: () => move(1) }, 'Next →'),
      el('a', { href: '#qid=' + encodeURIComponent(Q.qid[row]) }, 'Link')));
}

function questionNode(row) {
  const context = [['Hint', Q.hint], ['Caption', Q.caption]]
    .map(([name, column]) => (column[row] < 0 ? null : el('p', { class: 'context' }, el('b', {}, name), T(column[row]))));
  const heading = el('h2', {}, T(Q.question[row]) || '(no text)');
  return el('div', { class: 'question' }, el('div', {}, heading, context), picturesNode(row));
}

function picturesNode(row) {
  const pictures = imagesOf(row);
  if (pictures.length) {
    return el('div', { class: 'pictures' }, pictures.map((one, i) => el('img', {
      src: one.src, width: Math.min(one.w, 300), height: Math.round(one.h * Math.min(1, 300 / one.w)),
      alt: i ? `Image ${i + 1} of the question` : 'Image of the question',
    })));
  }
  if (!Q.image[row]) return null;
  return el('div', { class: 'pictures' }, el('p', { class: 'absent' }, 'This question has an image, which is not in this report.'));
}

function optionsNode(row) {
  if (!Q.choices[row].length) return null;
  return el('ul', { class: 'options', 'aria-label': 'Options' }, Q.choices[row].map((choice, i) => {
    const gold = Q.answer[row] === i;
    const by = main.stages.filter((_, stage) => main.preds[stage].a[row] === i).map((stage) => stage.name);
    const letter = el('span', { class: 'letter' }, `(${main.letters[i]})`);
    return el('li', { class: gold ? 'gold' : null }, letter, el('span', {}, T(choice)),
      el('span', { class: 'by' }, gold ? '✓ gold' : null, gold && by.length ? ' · ' : null,
        by.length ? `${gold ? '' : '✗ '}predicted by ${by.join(', ')}` : null));
  }));
}

// -- rationales --------------------------------------------------------------------------------------------

/** Sentences, each on the colour of its score and followed by it; search words are highlighted. */
function sentencesNode(sentences, scores, advantages) {
  if (!sentences.length) return el('div', { class: 'text none' }, 'empty');
  const words = (chosen.search || '').toLowerCase().split(/\s+/).filter((word) => word.length > 1);
  return el('div', { class: 'text' }, sentences.map((index, i) => {
    const score = scores ? scores[i] : null;
    const number = score === null ? null : el('span', { class: 'n' }, asScore(score));
    const advantage = !advantages || !showTokens ? null
      : el('span', { class: 'n', title: 'advantage of its last token' }, 'adv ' + asSigned(advantages[i] / 1000, 2));
    const colour = score === null ? '' : ' ' + step(score);
    return [i ? ' ' : null, el('span', { class: 'sent' + colour }, marked(T(index), words), number, advantage)];
  }));
}

function marked(text, words) {
  const lower = text.toLowerCase();
  if (lower.length !== text.length) return text; // some letters grow in lower case, which shifts the offsets
  const spots = [];
  for (const word of words) {
    for (let at = lower.indexOf(word); at >= 0; at = lower.indexOf(word, at + word.length)) spots.push([at, at + word.length]);
  }
  spots.sort((a, b) => a[0] - b[0]);
  const parts = [];
  let done = 0;
  for (const [from, to] of spots) {
    if (from < done) continue;
    parts.push(text.slice(done, from), el('mark', {}, text.slice(from, to)));
    done = to;
  }
  return [parts, text.slice(done)];
}

function stageLine(name, note, body, mean) {
  return el('div', { class: 'stage' }, el('h3', {}, name, note ? el('small', {}, note) : null), el('div', {}, body),
    el('div', { class: 'mean' }, mean >= 0 ? meanChip(mean, 'mean sentence score') : null));
}

function stagesPart(row) {
  if (!stageCount) return null;
  const lines = main.stages.map((stage, i) => {
    const columns = main.preds[i];
    if (!columns.s[row]) return stageLine(stage.name, null, el('div', { class: 'text none' }, 'no prediction of this question'), -1);
    const written = columns.w[row];
    const body = [stage.rationales ? sentencesNode(columns.s[row], columns.p[row]) : null, answerNode(i, row)];
    if (!stage.rationales) body.push(el('div', { class: 'text plain muted' }, T(written)));
    else if (written >= 0) body.push(fold('as the model wrote it', () => el('div', { class: 'raw' }, T(written))));
    return stageLine(stage.name, null, body, meanOf(i, row));
  });
  return el('section', { class: 'part' }, el('div', { class: 'line' }, el('h2', {}, 'Stages'), scaleLegend()), lines);
}

function answerNode(stage, row) {
  const verdict = verdictOf(stage, row);
  if (!verdict) return null;
  const answer = main.preds[stage].a[row];
  const words = { right: '✓ right', wrong: '✗ wrong', unparsed: '? no answer could be read' }[verdict];
  const chosenOption = verdict === 'unparsed' ? '' : `(${main.letters[answer]}) ${T(Q.choices[row][answer])} · `;
  return el('div', { class: 'text' }, chosenOption + words);
}

function goldPart(row) {
  const body = [['Solution', Q.solution], ['Lecture', Q.lecture]].map(([name, column]) => (column[row] < 0 ? null
    : el('div', { class: 'stage' }, el('h3', {}, name), el('div', { class: 'text plain' }, T(column[row])), el('div'))));
  if (!body.some(Boolean)) return null;
  return el('section', { class: 'part' }, el('div', { class: 'line' }, el('h2', {}, 'Gold')), body);
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
  return lines.length ? el('section', { class: 'part' }, el('div', { class: 'line' }, el('h2', {}, 'Judge')), lines) : null;
}

// -- the Teacher -------------------------------------------------------------------------------------------

function samplesPart(row) {
  const samples = row in main.sampled ? details().samples[row] : null;
  if (!samples) return null;
  const toggle = el('button', { 'aria-pressed': String(showTokens), 'aria-keyshortcuts': 't', onclick: toggleTokens },
    showTokens ? 'Hide rewards and advantages' : 'Rewards and advantages');
  return el('section', { class: 'part', id: 'samples' },
    el('div', { class: 'line' }, el('h2', {}, 'RL samples'), toggle, scaleLegend()), samples.map(sampleNode));
}

function sampleNode(sample) {
  const note = [main.rounds.length > 1 ? `round ${sample.round}` : null,
    sample.reward === undefined ? null : 'reward ' + asSigned(sample.reward / 1000, 2)].filter(Boolean).join(' · ');
  const scores = sample.p || null;
  const mean = scores && scores.length ? Math.round(scores.reduce((a, b) => a + b, 0) / scores.length) : -1;
  const body = [sentencesNode(sample.s, scores, sample.adv), whyNode(sample), showTokens ? tokensNode(sample) : null, replyNode(sample)];
  return stageLine(`Sample ${sample.k}`, note, body, mean);
}

const whyNode = (reply) => (reply.reason ? el('p', { class: 'why' }, el('b', {}, 'dropped: '), T(reply.why)) : null);

function replyNode(reply) {
  if (reply.reply === undefined && reply.about === undefined) return null;
  return fold("Teacher's reply", () => el('div', {},
    reply.about === undefined ? null : el('p', { class: 'muted' }, T(reply.about)),
    el('div', { class: 'raw' }, reply.reply === undefined ? 'none' : T(reply.reply))));
}

function tokensNode(sample) {
  if (!sample.tokens) return el('p', { class: 'none small' }, 'token rewards: not available');
  const most = Math.max(1, ...sample.advantages.map(Math.abs));
  const nodes = sample.tokens.map((piece, t) => {
    const advantage = sample.advantages[t], reward = sample.rewards[t];
    return el('span', { class: 'tok' }, el('span', {}, details().pieces[piece]),
      el('i', {}, reward ? asSigned(reward / 1000, 2) : '·'),
      el('i', { class: step(50 + (50 * advantage) / most) }, asSigned(advantage / 1000, 2)));
  });
  const legend = 'token · reward · advantage (before whitening, coloured by size within this sample)';
  return el('div', {}, el('p', { class: 'small muted' }, legend),
    el('div', { class: 'tokens' }, nodes));
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

/** Pieces [kind, words] with kind "same", "del" or "ins", by a longest common subsequence of the words. */
function wordDiff(before, after) {
  const a = before.split(/\s+/).filter(Boolean), b = after.split(/\s+/).filter(Boolean);
  let begin = 0, endA = a.length, endB = b.length;
  while (begin < endA && begin < endB && a[begin] === b[begin]) begin++;
  while (endA > begin && endB > begin && a[endA - 1] === b[endB - 1]) { endA--; endB--; }
  const n = endA - begin, m = endB - begin, width = m + 1;
  const length = new Uint16Array((n + 1) * width); // of the rest from i, j on
  for (let i = n - 1; i >= 0; i--) {
    for (let j = m - 1; j >= 0; j--) {
      length[i * width + j] = a[begin + i] === b[begin + j]
        ? length[(i + 1) * width + j + 1] + 1
        : Math.max(length[(i + 1) * width + j], length[i * width + j + 1]);
    }
  }
  const pieces = [];
  const put = (kind, word) => {
    const last = pieces[pieces.length - 1];
    if (last && last[0] === kind) last[1].push(word); else pieces.push([kind, [word]]);
  };
  a.slice(0, begin).forEach((word) => put('same', word));
  let i = 0, j = 0;
  while (i < n || j < m) {
    if (i < n && j < m && a[begin + i] === b[begin + j]) { put('same', a[begin + i]); i++; j++; }
    else if (j >= m || (i < n && length[(i + 1) * width + j] >= length[i * width + j + 1])) put('del', a[begin + i++]);
    else put('ins', b[begin + j++]);
  }
  a.slice(endA).forEach((word) => put('same', word));
  return pieces.map(([kind, words]) => [kind, words.join(' ')]);
}

function diffNode(before, after) {
  const node = el('div', { class: 'text' });
  wordDiff(before, after).forEach(([kind, words], i) => {
    if (i) node.append(' ');
    node.append(kind === 'same' ? words : el(kind, {}, words));
  });
  return node;
}

function correctionPart(row) {
  const correction = row in main.corrected ? details().corrections[row] : null;
  if (!correction) return null;
  const before = T(correction.original), after = correction.final === undefined ? null : T(correction.final);
  const body = after === null ? el('div', { class: 'text' }, before) : after === before
    ? [el('div', { class: 'text' }, before), el('p', { class: 'small muted' }, 'unchanged')] : diffNode(before, after);
  return el('section', { class: 'part' }, el('div', { class: 'line' }, el('h2', {}, 'Correction'),
    el('span', { class: 'small muted' }, el('del', {}, 'removed'), ' ', el('ins', {}, 'added'))),
    stageLine('Original → final', null, [body, whyNode(correction), replyNode(correction)], -1));
}
