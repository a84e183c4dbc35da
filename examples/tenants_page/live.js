// Asks for the figures twice a second, and shows them by process and in sum. Whatever comes from the server is set as
// text, never as markup: names are the tenants' own.
"use strict";

const EVERY_MS = 500;
const GONE_MS = 20000; // a process that did not answer for so long has ended, most likely
const POINTS = 120;
const RESULTS = ["hit", "coalesced", "miss", "absent", "error"];

const processes = new Map(); // pid -> {now, rates, heardAt}
const history = { requests: [], reads: [] };
const at = (id) => document.getElementById(id);
const whole = (number) => Math.round(number).toLocaleString("en");
const percent = (part, all) => (all ? `${((100 * part) / all).toFixed(1)}%` : "–");
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

// What the backends were asked for: the mirror, the authority, and the authority by the relay.
const reads = ({ lazy }) => lazy.units_read.mirror + lazy.units_read.authority + lazy.filled;

function hear(now) {
  const known = processes.get(now.pid);
  const before = known && known.now.at_s < now.at_s && known.now.requests <= now.requests ? known.now : null;
  const seconds = before ? now.at_s - before.at_s : 1;
  const rate = (of) => (before ? (of(now) - of(before)) / seconds : 0);
  const rates = {
    requests: rate((each) => each.requests),
    reads: rate(reads),
    coalesced: rate((each) => each.lazy.fetches.coalesced),
  };
  processes.set(now.pid, { now, rates, heardAt: Date.now() });
  for (const [pid, { heardAt }] of processes) {
    if (Date.now() - heardAt > GONE_MS) processes.delete(pid);
  }
}

function show(now) {
  const all = [...processes.values()].sort((one, other) => one.now.pid - other.now.pid);
  const rate = (name) => sum(all.map((each) => each.rates[name]));
  const total = (of) => sum(all.map((each) => of(each.now)));
  const loads = Object.fromEntries(RESULTS.map((result) => [result, total(({ lazy }) => lazy.fetches[result])]));
  const bytes = total(({ lazy }) => lazy.bytes);
  const most = total(({ lazy }) => lazy.max_bytes);

  for (const name of Object.keys(history)) {
    history[name].push(rate(name));
    if (history[name].length > POINTS) history[name].shift();
    draw(at(`${name}-chart`), history[name]);
    at(name).textContent = whole(rate(name));
  }
  at("view").textContent =
    `revision ${now.revision} from ${now.origin}, ${age(now.age_s)}${now.stale ? ", stale" : ""}, in process ${now.pid}`;
  at("requests-more").textContent = `${whole(total((each) => each.requests))} in all, by ${all.length} ${all.length === 1 ? "process" : "processes"}`;
  at("reads-more").textContent =
    `${whole(total(({ lazy }) => lazy.units_read.mirror))} from the mirror, ` +
    `${whole(total(({ lazy }) => lazy.units_read.authority + lazy.filled))} from the authority`;
  at("hits").textContent = percent(loads.hit, sum(Object.values(loads)));
  RESULTS.forEach((result, index) => {
    at("results").children[index].style.flexGrow = loads[result];
  });
  at("coalesced").textContent = whole(rate("coalesced"));
  at("coalesced-more").textContent = `${whole(loads.coalesced)} in all waited for a read that was under way`;
  at("held").textContent = whole(total(({ lazy }) => lazy.held));
  at("memory").children[0].style.width = percent(bytes, most);
  at("memory-more").textContent = `${whole(bytes / 1024)} of ${whole(most / 1024)} KiB`;

  rows(at("processes"), all.map(({ now: { pid, requests, lazy, revision, age_s, origin } }) => [
    String(pid), whole(requests), ...RESULTS.map((result) => whole(lazy.fetches[result])),
    whole(lazy.units_read.mirror), whole(lazy.units_read.authority), whole(lazy.units_read.wanted), whole(lazy.filled),
    whole(lazy.held), whole(lazy.bytes / 1024), String(revision), age(age_s), origin,
  ]), []);
  rows(at("latest"), now.latest.map((each) => [
    each.region, each.tenant, String(each.name), String(each.max_items), String(each.currency),
    `${each.tax_percent}%`, `${each.discount_percent}%`,
  ]), [0, 1, 2, 4]);
}

function age(seconds) {
  return seconds === null ? "never confirmed" : `${seconds.toFixed(1)} s old`;
}

function rows(body, lines, texts) {
  body.replaceChildren(...lines.map((line) => {
    const row = document.createElement("tr");
    row.append(...line.map((text, column) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      cell.classList.toggle("text", texts.includes(column));
      return cell;
    }));
    return row;
  }));
}

function draw(chart, values) {
  const most = Math.max(1, ...values);
  const points = values.map((value, index) => `${(240 * index) / (POINTS - 1)},${46 - (44 * value) / most}`);
  chart.querySelector("polyline").setAttribute("points", points.join(" "));
}

async function ask() {
  try {
    const answer = await fetch("live/figures", { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    const now = await answer.json();
    hear(now);
    show(now);
    at("trouble").hidden = true;
  } catch (error) {
    at("trouble").textContent = `No figures: ${error.message}. Asking again.`;
    at("trouble").hidden = false;
  }
  setTimeout(ask, EVERY_MS);
}

ask();
