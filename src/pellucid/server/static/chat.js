// The conversation: what was said, and the answer that is being made.

import { events, request } from "./api.js";
import { Answer, userMessage } from "./message.js";

const SAMPLING = ["temperature", "top_p", "max_tokens", "seed"];

export class Chat {
  constructor(sampling, list, onChange) {
    this.sampling = sampling; // the form
    this.list = list; // the element that messages are added to
    this.onChange = onChange; // called when an answer begins or ends
    this.history = [];
    this.running = null; // the AbortController of the answer that is being made
  }

  get isRunning() {
    return this.running !== null;
  }

  clear() {
    this.stop();
    this.history = [];
    this.list.replaceChildren();
  }

  stop() {
    this.running?.abort();
  }

  // Send a message, and show the answer as it comes.
  async send(text) {
    const running = (this.running = new AbortController());
    const history = this.history; // a new chat has another one
    const answer = new Answer();
    history.push({ role: "user", content: text });
    this.list.append(userMessage(text), answer.element);
    this.onChange();
    try {
      await this.receive(answer, this.body(history), running.signal);
    } catch (error) {
      if (running.signal.aborted) answer.stopped();
      else answer.failed(explain(error));
    }
    // An answer without text is not sent again, nor is the message that had no answer.
    if (answer.text) history.push({ role: "assistant", content: answer.text });
    else history.pop();
    if (this.running === running) this.running = null;
    this.onChange();
  }

  body(history) {
    const body = { stream: true };
    body.stream_options = { include_usage: true, include_explanation: true };
    for (const name of SAMPLING) {
      const value = this.sampling.elements[name].value;
      if (value !== "") body[name] = Number(value);
    }
    const system = this.sampling.elements.system.value;
    const first = system.trim() ? [{ role: "system", content: system }] : [];
    body.messages = [...first, ...history];
    return body;
  }

  async receive(answer, body, signal) {
    const response = await request("v1/chat/completions", { body, signal });
    let timings = null;
    let reason = null;
    for await (const chunk of events(response)) {
      const choice = chunk.choices[0];
      if (choice) answer.push(choice.delta);
      reason = choice?.finish_reason ?? reason;
      timings = chunk.timings ?? timings;
    }
    answer.finish(timings, reason);
  }
}

function explain(error) {
  return error instanceof TypeError ? "The server cannot be reached." : `Error: ${error.message}`;
}
