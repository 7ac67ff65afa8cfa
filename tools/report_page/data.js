// The report's data and queries on it. A row is a question's index in the columns.

const main = parsed('main');
const texts = parsed('texts').texts;
const Q = main.questions;
const rowCount = Q.qid.length;
const stageCount = main.stages.length;
const rowOf = new Map(Q.qid.map((qid, row) => [qid, row]));
const UNPARSED = -1, NO_ANSWER = -2;

const T = (index) => (index < 0 ? '' : texts[index]);

let detailData = null;
/** Samples, corrections and tokens: large, so parsed when a question that has some is first opened. */
const details = () => (detailData = detailData || parsed('details'));
let imageData = null;
const imagesOf = (row) => {
  imageData = imageData || parsed('images');
  return (imageData.of[row] || []).map((i) => imageData.list[i]);
};

// mean and lowest sentence score in hundredths, -1 for none; index: stage * rowCount + row
const means = new Int16Array(stageCount * rowCount).fill(-1);
const lows = new Int16Array(stageCount * rowCount).fill(-1);
main.preds.forEach((columns, stage) => {
  columns.p.forEach((scores, row) => {
    if (!scores || !scores.length) return;
    let sum = 0, low = 100;
    for (const score of scores) { sum += score; if (score < low) low = score; }
    means[stage * rowCount + row] = Math.round(sum / scores.length);
    lows[stage * rowCount + row] = low;
  });
});
const meanOf = (stage, row) => means[stage * rowCount + row];

/** 'right', 'wrong', 'unparsed', or null where the stage has no answer. */
function verdictOf(stage, row) {
  const answer = main.preds[stage].a[row];
  if (answer === NO_ANSWER) return null;
  return answer === UNPARSED ? 'unparsed' : Q.answer[row] < 0 ? null : answer === Q.answer[row] ? 'right' : 'wrong';
}

/** The value by which stages are compared: 1 or 0 for an answer, else the mean score; null for neither. */
function worth(stage, row, byAnswer) {
  if (byAnswer) {
    const verdict = verdictOf(stage, row);
    return verdict === null ? null : Number(verdict === 'right');
  }
  const mean = meanOf(stage, row);
  return mean < 0 ? null : mean;
}

/** -1 worse, 0 equal, 1 better from one stage to another; null where they cannot be compared. */
function change(from, to, row) {
  const byAnswer = main.stages[from].answers && main.stages[to].answers;
  const before = worth(from, row, byAnswer), after = worth(to, row, byAnswer);
  return before === null || after === null ? null : Math.sign(after - before);
}

/** Lowest score of any stage or sample for a question; -1 for none. */
function lowest(row) {
  let low = main.sampled[row] ? main.sampled[row].low : -1;
  for (let stage = 0; stage < stageCount; stage++) {
    const here = lows[stage * rowCount + row];
    if (here >= 0 && (low < 0 || here < low)) low = here;
  }
  return low;
}

/** The reasons for which replies on a question were dropped, as a list of words. */
function droppedReasons(row) {
  const reasons = main.sampled[row] ? [...main.sampled[row].dropped] : [];
  if (main.corrected[row]) reasons.push('correction: ' + main.corrected[row]);
  return reasons;
}

/** The verdict of one file: the winner's index (0, 1), "tie", "mixed" (each order has another winner), or null. As in
 * tools/win_rate.py a win and a tie make a win. */
function judged(file, row) {
  const found = main.verdicts[file].rows[row];
  if (!found) return null;
  const wins = (side) => found.filter(([, winner]) => winner === side).length;
  const lead = wins('a') - wins('b');
  return lead > 0 ? 0 : lead < 0 ? 1 : wins('a') ? 'mixed' : 'tie';
}

let searchable = null;
/** One lower-case text per row with everything that the search covers. */
function searchTexts() {
  if (searchable) return searchable;
  const lower = texts.map((text) => text.toLowerCase());
  const at = (index) => (index < 0 ? '' : lower[index]);
  searchable = Q.qid.map((qid, row) => {
    const parts = [qid.toLowerCase(), at(Q.question[row]), at(Q.hint[row]), ...Q.choices[row].map(at), at(Q.solution[row])];
    parts.push(at(Q.caption[row]), at(Q.topic[row]));
    for (const columns of main.preds) if (columns.s[row]) parts.push(...columns.s[row].map(at));
    return parts.join('\n');
  });
  return searchable;
}
