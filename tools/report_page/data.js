// The report's data and queries on it. A row is a question's index.

const main = parsed('main');
const Q = main.questions;
const rowCount = Q.length;
const stageCount = main.stages.length;
const rowOf = new Map(Q.map((question, row) => [question.qid, row]));
const UNPARSED = -1, NO_ANSWER = -2;

/** A function that calls `make` once, when its value is first needed. */
const lazily = (make) => { let value; return () => (value ??= make()); };
const details = lazily(() => parsed('details')); // samples, corrections and tokens: large
const imageData = lazily(() => parsed('images'));
const imagesOf = (row) => (imageData().of[row] || []).map((i) => imageData().list[i]);

const NO_PREDICTION = { s: null, a: NO_ANSWER, mean: -1, low: -1 };
const predOf = (stage, row) => main.preds[stage][row] || NO_PREDICTION;
/** The mean of scores, in hundredths; -1 for none. */
const meanOf = (scores) => (scores?.length ? Math.round(scores.reduce((a, b) => a + b, 0) / scores.length) : -1);
for (const pred of main.preds.flatMap(Object.values)) {
  pred.mean = meanOf(pred.p);
  pred.low = pred.p?.length ? Math.min(...pred.p) : -1;
}

/** 'right', 'wrong', 'unparsed', or null where the stage has no answer. */
function verdictOf(stage, row) {
  const answer = predOf(stage, row).a;
  if (answer === NO_ANSWER) return null;
  return answer === UNPARSED ? 'unparsed' : Q[row].answer < 0 ? null : answer === Q[row].answer ? 'right' : 'wrong';
}

/** The value by which stages are compared: 1 or 0 for an answer, else the mean score; null for neither. */
function worth(stage, row, byAnswer) {
  const verdict = verdictOf(stage, row), mean = predOf(stage, row).mean;
  if (byAnswer) return verdict === null ? null : Number(verdict === 'right');
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
  const all = [main.sampled[row]?.low ?? -1, ...main.stages.map((_, stage) => predOf(stage, row).low)];
  const lows = all.filter((low) => low >= 0);
  return lows.length ? Math.min(...lows) : -1;
}

/** The reasons for which replies on a question were dropped, as a list of words. */
const droppedReasons = (row) => [...(main.sampled[row]?.dropped || []),
  ...(main.corrected[row] ? ['correction: ' + main.corrected[row]] : [])];

/** The verdict of one file: the winner's index (0, 1), "tie", "mixed" (each order has another winner), or null. As in
 * tools/win_rate.py a win and a tie make a win. */
function judged(file, row) {
  const found = main.verdicts[file].rows[row];
  if (!found) return null;
  const wins = (side) => found.filter(([, winner]) => winner === side).length;
  const lead = wins('a') - wins('b');
  return lead > 0 ? 0 : lead < 0 ? 1 : wins('a') ? 'mixed' : 'tie';
}

/** One lower-case text per row with everything that the search covers. */
const searchTexts = lazily(() => Q.map((q, row) => [q.qid, q.question, q.hint, ...q.choices, q.solution, q.caption,
  q.topic, ...main.stages.flatMap((_, stage) => predOf(stage, row).s || [])].join('\n').toLowerCase()));
