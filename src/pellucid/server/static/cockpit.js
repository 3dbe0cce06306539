// What the engine does now: asked for twice a second while the page is visible.

import { request } from "./api.js";

const INTERVAL = 500; // ms between two questions
const RETRY = 2000; // the same while the server does not answer
const NUM_RATES = 120; // points of the chart of tokens per second: a minute
const NUM_STEPS = 90; // bars of the chart of steps
const SPAN = 3; // seconds that the number of tokens per second is a mean of
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en");

export class Cockpit {
  constructor() {
    this.readings = []; // [time, tokens], of the last SPAN seconds
    this.rates = [];
    this.steps = [];
    this.timer = 0;
    this.mayAsk = true; // for the API key, once
  }

  start() {
    document.addEventListener("visibilitychange", () => this.wake());
    this.wake();
  }

  wake() {
    clearTimeout(this.timer);
    if (!document.hidden) this.poll();
  }

  async poll() {
    clearTimeout(this.timer);
    const last = this.steps.at(-1)?.step ?? 0;
    let wait = INTERVAL;
    try {
      const path = `debug/stats?after=${last}`;
      const response = await request(path, { mayAsk: this.mayAsk });
      this.show(await response.json());
      this.mayAsk = true;
    } catch (error) {
      wait = RETRY;
      if (error.status === 401) this.mayAsk = false;
      this.showNothing();
      this.showState("bad", error.status === 401 ? "needs an API key" : "not reachable");
    }
    if (document.hidden) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.poll(), wait);
  }

  show(stats) {
    byId("model").textContent = stats.model;
    byId("model").title = `${stats.model}, up to ${whole.format(stats.max_model_len)} tokens`;
    document.title = `${stats.model} · Pellucid`;
    if (this.steps.length && stats.num_steps < this.steps.at(-1).step) this.forget();
    const rate = this.rateOf(stats);
    this.showRequests(stats, rate);
    this.showRates(rate);
    this.showBlocks(stats);
    if (stats.recent_steps.length) this.showSteps(stats.recent_steps);
  }

  // The server was started again.
  forget() {
    this.steps = [];
    this.readings = [];
  }

  // Tokens per second of all answers, over the last seconds.
  rateOf(stats) {
    this.readings.push([stats.time, stats.num_output_tokens]);
    while (this.readings.length > 2 && stats.time - this.readings[0][0] > SPAN) {
      this.readings.shift();
    }
    const [time, tokens] = this.readings[0];
    return stats.time > time ? (stats.num_output_tokens - tokens) / (stats.time - time) : 0;
  }

  showRequests(stats, rate) {
    byId("running").textContent = whole.format(stats.num_running);
    byId("waiting").textContent = whole.format(stats.num_waiting);
    byId("rate").textContent = whole.format(rate < 10 ? +rate.toFixed(1) : Math.round(rate));
    const reasons = Object.entries(stats.waits_for);
    byId("waits").replaceChildren(
      ...reasons.map(([reason, count]) => {
        const item = document.createElement("li");
        item.textContent = `${whole.format(count)} waiting: ${reason}`;
        return item;
      }),
    );
    if (stats.is_draining) this.showState("busy", "shutting down");
    else if (stats.num_running) this.showState("busy", `${stats.num_running} running`);
    else this.showState("ready", "ready");
  }

  // What runs is not known: old figures would look like news.
  showNothing() {
    for (const id of ["running", "waiting", "rate"]) byId(id).textContent = "–";
    byId("waits").replaceChildren();
  }

  showState(kind, text) {
    const element = byId("state");
    if (element.textContent !== text) element.textContent = text; // else it is read out again
    element.className = `state ${kind}`;
  }

  showRates(rate) {
    this.rates.push(rate);
    this.rates.splice(0, this.rates.length - NUM_RATES);
    const top = Math.max(...this.rates, 1);
    const x0 = NUM_RATES - this.rates.length;
    const y = (value) => (31 - 29 * (value / top)).toFixed(2);
    const points = this.rates.map((value, i) => `${x0 + i + 0.5} ${y(value)}`);
    const line = `M${points.join("L")}`;
    const [area, stroke] = byId("rate-chart").children;
    stroke.setAttribute("d", line);
    area.setAttribute("d", `${line}V32H${x0 + 0.5}Z`);
    const most = Math.max(...this.rates);
    byId("rate-top").textContent = most > 0 ? `peak ${whole.format(Math.round(most))}` : "";
  }

  showBlocks(stats) {
    const total = stats.num_kv_blocks;
    const [held, cached] = byId("kv-bar").children;
    setShare(held, stats.num_held_blocks / total);
    setShare(cached, stats.num_cached_blocks / total);
    byId("kv-held").textContent = whole.format(stats.num_held_blocks);
    byId("kv-cached").textContent = whole.format(stats.num_cached_blocks);
    byId("kv-free").textContent = whole.format(stats.num_free_blocks);
    const share = Math.round((100 * stats.num_held_blocks) / total);
    byId("kv-bar").setAttribute("aria-label", `${share} % of the KV cache is held by requests`);
    const hits = stats.num_cached_tokens / stats.num_prompt_tokens;
    byId("hits").textContent = stats.num_prompt_tokens
      ? `${Math.round(100 * hits)} % of prompt tokens were cached`
      : "";
  }

  showSteps(steps) {
    this.steps.push(...steps);
    this.steps.splice(0, this.steps.length - NUM_STEPS);
    const seconds = this.steps.map((step) => step.seconds).sort((a, b) => a - b);
    const typical = seconds[seconds.length >> 1];
    const longest = seconds.at(-1);
    // A long step would make all others flat, so bars are cut at four times the median.
    const top = Math.min(longest, 4 * typical);
    const chart = byId("steps-chart");
    while (chart.children.length < 2 * this.steps.length) {
      chart.append(document.createElementNS(SVG, "rect"));
    }
    const x0 = NUM_STEPS - this.steps.length;
    this.steps.forEach((step, i) => {
      const kind = step.num_tokens > step.num_requests ? "prefill" : "decode";
      const height = 40 * Math.min(1, step.seconds / top);
      const inside = height * (step.forward_seconds / step.seconds);
      place(chart.children[2 * i], `${kind} outside`, x0 + i, height);
      place(chart.children[2 * i + 1], kind, x0 + i, inside);
    });
    byId("steps-typical").textContent = `median ${milliseconds(typical)}`;
    byId("steps-longest").textContent = `longest ${milliseconds(longest)}`;
    chart.setAttribute(
      "aria-label",
      `Times of the last ${this.steps.length} steps: median ${milliseconds(typical)}, ` +
        `longest ${milliseconds(longest)}`,
    );
  }
}

// The part of a bar; a small share is still seen.
function setShare(element, share) {
  element.style.width = `${100 * share}%`;
  element.style.minWidth = share > 0 ? "3px" : "0";
}

function place(rect, kind, x, height) {
  rect.setAttribute("class", kind);
  rect.setAttribute("x", x + 0.1);
  rect.setAttribute("y", (40 - height).toFixed(2));
  rect.setAttribute("width", 0.8);
  rect.setAttribute("height", height.toFixed(2));
}

function milliseconds(seconds) {
  const value = 1000 * seconds;
  return `${value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ms`;
}
