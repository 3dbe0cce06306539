// Joins the page's parts: the composer, the conversation and the panel.

import { Chat } from "./chat.js";
import { Cockpit } from "./cockpit.js";

const byId = (id) => document.getElementById(id);
const prompt = byId("prompt");
const log = byId("log");
const sampling = byId("sampling");
const panelButton = byId("show-panel");

// The log follows an answer that grows, unless the reader has scrolled up.
let isAtEnd = true;

const chat = new Chat(sampling, byId("messages"), showRunning);

function showRunning() {
  byId("welcome").hidden = byId("messages").childElementCount > 0;
  byId("send").hidden = chat.isRunning;
  byId("stop").hidden = !chat.isRunning;
  if (chat.isRunning) scrollToEnd();
}

function scrollToEnd() {
  log.scrollTop = log.scrollHeight;
}

// A textarea as high as its text, up to its CSS maximum.
function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

function submit() {
  const text = prompt.value.trim();
  if (!text || chat.isRunning) return;
  if (!sampling.checkValidity()) {
    showPanel(true); // a hidden field cannot show what is wrong with it
    sampling.reportValidity();
    return;
  }
  showPanel(false);
  prompt.value = "";
  fitPrompt();
  chat.send(text);
}

let position = 0; // of the log while the panel hides it in a narrow window

function showPanel(isShown) {
  if (document.body.classList.contains("panel-shown") === isShown) return;
  const follows = isAtEnd;
  if (isShown) position = log.scrollTop;
  document.body.classList.toggle("panel-shown", isShown);
  panelButton.setAttribute("aria-expanded", String(isShown));
  // What is hidden loses its place.
  if (!isShown && follows) scrollToEnd();
  else if (!isShown) log.scrollTop = position;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
sampling.addEventListener("submit", (event) => event.preventDefault());
prompt.addEventListener("input", fitPrompt);
prompt.addEventListener("keydown", (event) => {
  // Enter also ends the choice of a character in an input method.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || byId("key-dialog").open) return;
  if (chat.isRunning) chat.stop();
  else showPanel(false);
});
byId("stop").addEventListener("click", () => {
  chat.stop();
  prompt.focus();
});
byId("new-chat").addEventListener("click", () => {
  chat.clear();
  showRunning();
  showPanel(false);
  prompt.focus();
});
panelButton.addEventListener("click", () => {
  showPanel(!document.body.classList.contains("panel-shown"));
});
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => {
    prompt.value = example.textContent;
    submit();
    prompt.focus();
  });
}

log.addEventListener("scroll", () => {
  if (log.clientHeight > 0) isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
});
log.addEventListener("grown", () => {
  if (isAtEnd) scrollToEnd();
});

new Cockpit().start();
