// Following a run: the page asks which version of the run there is, and reloads itself when there is another.

const EVERY = 2000;  // milliseconds
const KEPT = "seeupo_trl " + location.pathname + location.search;
const following = document.getElementById("watch");
following.hidden = false;

const keyOf = (one) => one && [one.split, one.iteration, one.group, one.trajectory].join(" ");

// Where the reader is: filters, the episode and what of it is unfolded, and how far everything is scrolled.
function keep() {
  const item = list.querySelector("[aria-current]");
  sessionStorage.setItem(KEPT, JSON.stringify({
    values: Object.fromEntries(fields.map((name) => [name, input[name].value])),
    current: keyOf(current),
    below: item ? item.getBoundingClientRect().top - list.getBoundingClientRect().top : null,
    list: list.scrollTop,
    open: [...detail.querySelectorAll("details")].map((details) => details.open),
    tables: curves.querySelector(".numbers")?.open || false,
    detail: detail.scrollTop,
    window: scrollY,
    focused: document.activeElement.id,
  }));
}

function restore() {
  const kept = JSON.parse(sessionStorage.getItem(KEPT));
  sessionStorage.removeItem(KEPT);
  if (kept === null) return;
  for (const name of fields) input[name].value = kept.values[name];
  form.dispatchEvent(new Event("input"));
  const before = shown.find((one) => keyOf(one) === kept.current);
  if (before) select(before);
  const tables = curves.querySelector(".numbers");
  if (tables) tables.open = kept.tables;
  [...detail.querySelectorAll("details")].forEach((details, at) => { details.open = before && kept.open[at]; });
  document.getElementById(kept.focused)?.focus({ preventScroll: true });
  setTimeout(() => {  // what was unfolded is drawn by then
    const item = list.querySelector("[aria-current]");
    if (before && kept.below !== null) {
      list.scrollTop += item.getBoundingClientRect().top - list.getBoundingClientRect().top - kept.below;
    } else list.scrollTop = kept.list;
    if (before) detail.scrollTop = kept.detail;
    scrollTo(0, kept.window);
  });
}

function age(seconds) {
  if (seconds < 90) return count(Math.max(0, Math.round(seconds)), "second");
  if (seconds < 5400) return count(Math.round(seconds / 60), "minute");
  return count(Math.round(seconds / 3600), "hour");
}

function tell(changed) {
  following.className = "";
  if (changed === null) {
    following.textContent = "Following: nothing saved yet";
    return;
  }
  const when = new Date(changed * 1000).toLocaleString();
  following.textContent = `Following: last change ${when}, ${age(Date.now() / 1000 - changed)} ago`;
}

async function ask() {
  try {
    const answer = await (await fetch("/version", { cache: "no-store" })).json();
    if (answer.version !== data.watch.version) {
      keep();
      location.reload();
      return;
    }
    tell(answer.changed);
  } catch {
    following.className = "warn";
    following.textContent = "No longer following: the program that served this page does not answer";
  }
  setTimeout(ask, EVERY);
}

history.scrollRestoration = "manual";
restore();
tell(data.watch.changed);
setTimeout(ask, EVERY);
