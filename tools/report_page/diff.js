// A correction as a difference in words.

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
