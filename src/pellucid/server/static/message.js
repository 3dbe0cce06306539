// The messages of the chat as elements. An answer tells beneath it where its time went.

import { TextView, fillParagraph } from "./text.js";

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

export function userMessage(text) {
  const element = make("article", "message user");
  element.setAttribute("aria-label", "You");
  element.append(make("p", "", text));
  return element;
}

// An answer that grows: reasoning (folded), text, and at its end the figures.
export class Answer {
  constructor() {
    this.text = "";
    this.reasoning = "";
    this.start = performance.now();
    this.element = make("article", "message answer waiting");
    this.element.setAttribute("aria-label", "Model");
    this.element.setAttribute("aria-busy", "true");
    this.body = make("div", "text");
    this.element.append(this.body);
    this.view = new TextView(this.body);
    this.thoughts = null;
    this.frame = 0;
  }

  push(delta) {
    this.reasoning += delta.reasoning_content ?? "";
    this.text += delta.content ?? "";
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    if (this.text || this.reasoning) this.element.classList.remove("waiting");
    if (this.reasoning && !this.thoughts) this.addThoughts();
    if (this.thoughts) {
      this.thoughts.view.show(this.reasoning);
      this.thoughts.summary.textContent = this.text ? "Reasoning" : "Reasoning …";
    }
    this.view.show(this.text);
    this.element.dispatchEvent(new CustomEvent("grown", { bubbles: true }));
  }

  addThoughts() {
    const details = make("details", "reasoning");
    const summary = make("summary", "");
    const text = make("div", "text");
    details.append(summary, text);
    this.body.before(details);
    this.thoughts = { summary, view: new TextView(text) };
  }

  // The end of an answer that is whole; `timings` and `usage` are those of the last chunk.
  finish(timings, reason) {
    const note = reason === "length" ? "ended at the limit of tokens" : "";
    this.end(timings ? figures(timings, note) : make("p", "figure-line", note));
  }

  stopped() {
    const seconds = (performance.now() - this.start) / 1000;
    this.end(make("p", "figure-line", `stopped after ${seconds.toFixed(1)} s`));
  }

  failed(message) {
    const element = make("p", "failure", message);
    element.setAttribute("role", "alert");
    this.end(element);
  }

  end(element) {
    this.element.append(element);
    this.draw();
    this.element.classList.remove("waiting");
    this.element.setAttribute("aria-busy", "false");
  }
}

function milliseconds(value) {
  if (value >= 1000) return `${(value / 1000).toFixed(2)} s`;
  return `${value.toFixed(value < 10 ? 1 : 0)} ms`;
}

// One line with the figures that matter; opened, all of them.
function figures(timings, note) {
  const queue = timings.queue_ms ?? 0;
  const prefill = timings.prompt_ms ?? 0;
  const decode = timings.predicted_ms ?? 0;
  const details = make("details", "figures-of-answer");
  // The line.
  const line = [];
  if (decode > 0) line.push(`${timings.predicted_per_second.toFixed(1)} tokens/s`);
  line.push(timings.predicted_n === 1 ? "1 token" : `${timings.predicted_n} tokens`);
  line.push(`first after ${milliseconds(queue + prefill)}`);
  if (timings.bound) {
    const share = timings.share_of_ceiling;
    const ceiling = share == null ? "" : ` at ${Math.round(100 * share)} % of the ceiling`;
    line.push(`bound by ${timings.bound}${ceiling}`);
  }
  if (note) line.push(note);
  details.append(make("summary", "figure-line", line.join(" · ")));
  // The phases, as a bar and as numbers.
  const computed = timings.prompt_n;
  const prompt = `${computed} tokens` + (timings.cache_n ? ` + ${timings.cache_n} cached` : "");
  const phases = [
    ["queue", "waited", queue, ""],
    ["prefill", "prefill", prefill, prompt],
    ["decode", "decode", decode, `${Math.max(0, timings.predicted_n - 1)} tokens`],
  ];
  const bar = make("div", "bar");
  const list = make("dl", "legend phases");
  for (const [kind, name, value, more] of phases) {
    const part = make("span", kind);
    part.style.flexGrow = value;
    bar.append(part);
    const row = make("div", "");
    row.append(make("dt", kind, name), make("dd", "", milliseconds(value)));
    if (more) row.append(make("dd", "more", more));
    list.append(row);
  }
  details.append(bar, list);
  if (timings.explanation) {
    const sentence = make("p", "explanation");
    fillParagraph(sentence, timings.explanation);
    details.append(sentence);
  }
  return details;
}
