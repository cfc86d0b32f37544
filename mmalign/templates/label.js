// The page of `mmalign pairs label`. A judgement is kept in the browser until the server says that
// it is on disk; only then the next pair is shown. All text from outside goes through textContent.
"use strict";

const TIMEOUT_MS = 10000;
const RETRY_MS = 2000;
const POLL_MS = 3000;
const find = (id) => document.getElementById(id);
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

const NAME = "mmalign.annotator";
const PENDING = "mmalign.pending"; // a judgement that is not known to be on disk

let annotator = localStorage.getItem(NAME);
let shown = null; // the pair on the screen, once both of its pictures are there
let last = null; // the pair judged before it
let latest = 0; // number of the newest request: answers to older ones are not shown
let poll = 0;
let retryNow = () => {};

// One request. `again` says that sending it once more may help.
async function ask(path, body) {
  const options = { signal: AbortSignal.timeout(TIMEOUT_MS) };
  if (body) {
    options.method = "POST";
    options.headers = { "Content-Type": "application/json", "X-Mmalign": "label" };
    options.body = JSON.stringify(body);
  }
  try {
    const response = await fetch(path, options);
    if (response.ok) {
      return { state: await response.json() };
    }
    const text = (await response.text()).trim();
    const reason = text.startsWith("{") ? JSON.parse(text).error : text;
    const error = reason.replace(/[.]?$/, ".");
    return { error, again: response.status >= 500 || response.status === 401 };
  } catch {
    return { error: "The server cannot be reached.", again: true };
  }
}

// Repeats a request until it is answered, saying why it is not.
async function insist(path, body) {
  for (let tries = 0; ; tries++) {
    const answer = await ask(path, body);
    if (!answer.again) {
      find("trouble").hidden ||= tries > 0;
      return answer;
    }
    complain(answer.error + (body ? " Nothing is lost: your answer is sent again." : ""));
    await Promise.race([pause(RETRY_MS), new Promise((resolve) => (retryNow = resolve))]);
  }
}

function complain(text) {
  find("trouble").firstElementChild.textContent = text;
  find("trouble").hidden = false;
}

// Sends what must not be lost: it outlives a reload of the page too.
async function settle(path, body) {
  localStorage.setItem(PENDING, JSON.stringify({ path, body }));
  await follow(path, body, () => localStorage.removeItem(PENDING));
}

function refresh() {
  return follow(`state?annotator=${encodeURIComponent(annotator)}`);
}

// Shows what the server answers, unless something newer has been asked meanwhile.
async function follow(path, body, settled = () => {}) {
  const number = ++latest;
  clearTimeout(poll);
  shown = null;
  enable();
  const answer = await insist(path, body);
  settled();
  if (number !== latest) {
    return;
  }
  if (answer.state) {
    await show(answer.state, number);
    return;
  }
  complain(answer.error);
  if (body) {
    await refresh();
  } else {
    askName();
  }
}

function judge(side) {
  if (!shown) {
    return;
  }
  find("trouble").hidden = true;
  for (const id of ["left", "right"]) {
    find(id).classList.toggle("chosen", side === null || id === side);
  }
  settle("judge", { annotator, pair: shown.key, winner: side && shown[side] });
}

function undo() {
  if (!find("undo").disabled) {
    settle("undo", { annotator, pair: last });
  }
}

async function show(state, number) {
  const pair = state.pair;
  last = state.last;
  describe(state);
  enable();
  if (!pair) {
    poll = setTimeout(refresh, POLL_MS);
    return;
  }
  const complete = await pictures(pair);
  if (number !== latest) {
    return;
  }
  if (!complete) {
    poll = setTimeout(refresh, RETRY_MS);
    return;
  }
  shown = pair;
  enable();
  for (const image of state.upcoming) {
    new Image().src = `images/${image}`;
  }
}

// Nobody can judge what is not there yet: input is off until both pictures are decoded.
async function pictures(pair) {
  const images = ["left", "right"].map((side) => {
    const image = find(side).firstElementChild;
    image.src = `images/${pair[side]}`;
    return image;
  });
  try {
    await Promise.all(images.map((image) => image.decode()));
  } catch {
    return false;
  }
  for (const image of images) {
    image.classList.toggle("tiny", image.naturalWidth < 200);
    image.parentElement.classList.remove("chosen");
  }
  return true;
}

function describe(state) {
  const { mine, total, people } = state.progress;
  find("sides").hidden = !state.pair;
  find("done").hidden = Boolean(state.pair);
  find("prompt").textContent = state.pair ? state.pair.prompt : "";
  find("count").textContent = total ? `${mine} of ${total}` : "";
  find("bar").value = total ? mine / total : 0;
  find("rename").textContent = state.annotator;
  find("rename").hidden = false;
  find("done-title").textContent = total ? `You have judged all ${total} pairs.` : "There are no pairs yet.";
  const { pairs, share, kappa } = state.agreement;
  const parts = people > 1 ? [`${people} people`] : [];
  if (share !== null) {
    parts.push(`they agree on ${Math.round(100 * share)} % of ${pairs} shared pairs`);
  }
  if (kappa !== null) {
    parts.push(`Fleiss’ kappa ${kappa.toFixed(2)}`);
  }
  find("agreement").textContent = parts.join(" · ");
}

function enable() {
  find("tie").disabled = !shown;
  find("sides").classList.toggle("waiting", !shown);
  find("undo").disabled = !last || localStorage.getItem(PENDING) !== null;
}

function askName() {
  find("name").value = annotator || "";
  find("who").showModal();
}

function start() {
  const pending = JSON.parse(localStorage.getItem(PENDING));
  return pending ? settle(pending.path, pending.body) : refresh();
}

find("left").addEventListener("click", () => judge("left"));
find("right").addEventListener("click", () => judge("right"));
find("tie").addEventListener("click", () => judge(null));
find("undo").addEventListener("click", undo);
find("retry").addEventListener("click", () => retryNow());
find("rename").addEventListener("click", askName);
find("who").addEventListener("close", () => {
  annotator = find("name").value.trim().replace(/\s+/g, " ") || annotator;
  if (!annotator) {
    return askName();
  }
  localStorage.setItem(NAME, annotator);
  return start();
});
const KEYS = {
  1: () => judge("left"),
  2: () => judge("right"),
  0: () => judge(null),
  Backspace: undo,
};
document.addEventListener("keydown", (event) => {
  if (find("who").open || event.repeat || event.ctrlKey || event.metaKey || event.altKey) {
    return;
  }
  const act = KEYS[event.key];
  if (act) {
    event.preventDefault();
    act();
  }
});

if (annotator) {
  start();
} else {
  askName();
}
