// Tabs, links, keys and theme.

const tabs = ['overview', 'inspector'];

function showTab(name) {
  for (const tab of tabs) {
    byId(tab).hidden = tab !== name;
    const button = byId('tab-' + tab);
    button.setAttribute('aria-selected', String(tab === name));
    button.tabIndex = tab === name ? 0 : -1;
  }
  if (name === 'inspector') drawRows();
}

/** Set the address's `hash` without a new entry in the history. */
function note(hash) {
  try { history.replaceState(null, '', hash); } catch { location.hash = hash; }
}

function openRow(row, keepAddress) {
  current = row;
  showTab('inspector');
  drawDetail();
  const place = shown.indexOf(row);
  if (place >= 0) scrollToPlace(place);
  drawRows();
  if (!keepAddress) note('#qid=' + encodeURIComponent(Q[row].qid));
}

/** Open the next or previous question of the list, or its first if the open one is not in the list. */
function move(by) {
  if (!shown.length) return;
  const place = shown.indexOf(current);
  const next = place < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, place + by));
  if (shown[next] !== current) openRow(shown[next]);
}

function follow() {
  let hash = location.hash.slice(1);
  try { hash = decodeURIComponent(hash); } catch { /* not an escape: the hash is used as it is */ }
  if (hash.startsWith('qid=')) {
    const row = rowOf.get(hash.slice(4));
    if (row !== undefined) return openRow(row, true);
    current = -1;
    showTab('inspector');
    drawRows();
    return drawDetail(`Question ${hash.slice(4)} is not in this report.`);
  }
  if (hash === 'inspector') return showInspector();
  showTab('overview');
}

function showInspector() {
  if (current < 0 && shown.length) openRow(shown[0]);
  else { showTab('inspector'); drawDetail(); note(current < 0 ? '#inspector' : '#qid=' + encodeURIComponent(Q[current].qid)); }
}

function showOverview() {
  showTab('overview');
  note('#overview');
}

const keys = {
  j: () => move(1), ArrowRight: () => move(1), k: () => move(-1), ArrowLeft: () => move(-1),
  t: toggleTokens, o: showOverview, i: showInspector,
  '/': () => { showInspector(); byId('search').focus(); },
  '?': () => byId('help').showModal(),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId('help').open) return;
  const at = event.target;
  if (at.getAttribute('role') === 'tab' && event.key.startsWith('Arrow')) {
    event.preventDefault();
    const other = at.id === 'tab-overview' ? showInspector : showOverview;
    other();
    return byId(at.id === 'tab-overview' ? 'tab-inspector' : 'tab-overview').focus();
  }
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(at.tagName)) {
    if (event.key === 'Escape') at.blur();
    return;
  }
  if (at.id === 'list' && (event.key === 'ArrowDown' || event.key === 'ArrowUp')) {
    event.preventDefault();
    return move(event.key === 'ArrowDown' ? 1 : -1);
  }
  const inInspector = !byId('inspector').hidden;
  if (keys[event.key] && (inInspector || 'oi/?'.includes(event.key))) {
    event.preventDefault();
    keys[event.key]();
  }
}

// -- theme -------------------------------------------------------------------------------------------------

const systemDark = matchMedia('(prefers-color-scheme: dark)');
let theme = 'system';
try { theme = localStorage.getItem('ares-theme') || 'system'; } catch { /* no storage: keep the system's theme */ }

function applyTheme() {
  const dark = theme === 'dark' || (theme === 'system' && systemDark.matches);
  document.documentElement.dataset.theme = dark ? 'dark' : 'light';
  byId('theme').textContent = 'Theme: ' + theme;
}

function nextTheme() {
  theme = { system: 'dark', dark: 'light', light: 'system' }[theme] || 'system';
  try { localStorage.setItem('ares-theme', theme); } catch { /* no storage */ }
  applyTheme();
}

// -- begin -------------------------------------------------------------------------------------------------

applyTheme();
systemDark.addEventListener('change', applyTheme);
byId('theme').addEventListener('click', nextTheme);
byId('keys').addEventListener('click', () => byId('help').showModal());
byId('tab-overview').addEventListener('click', showOverview);
byId('tab-inspector').addEventListener('click', showInspector);
document.addEventListener('keydown', onKey);
addEventListener('hashchange', follow);
buildFilters();
applyFilters();
drawOverview();
drawDetail();
follow();
// for tests: when the page could be read, counted from the navigation that opened it
requestAnimationFrame(() => setTimeout(() => performance.mark('report-ready')));
