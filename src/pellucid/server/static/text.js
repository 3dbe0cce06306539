// Text of a model as elements: paragraphs with `code` in them, and code blocks between ``` fences.
//
// Text becomes text nodes and nothing else, so that no text of a model becomes HTML.

const FENCE = /^ {0,3}(`{3,})([^`\n]*)$/;

// The blocks of a text: {isCode, language, text}. An open fence runs to the end.
export function blocksOf(text) {
  const blocks = [];
  let lines = [];
  let fence = null; // of the block that is open
  const finish = () => {
    const joined = lines.join("\n");
    if (fence) blocks.push({ isCode: true, language: fence.language, text: joined });
    else if (joined.trim()) blocks.push({ isCode: false, language: "", text: trimLines(joined) });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const found = line.match(FENCE);
    const closes = fence && found && found[1].length >= fence.length && !found[2].trim();
    if (closes) {
      finish();
      fence = null;
    } else if (found && !fence) {
      finish();
      fence = { length: found[1].length, language: found[2].trim().slice(0, 24) };
    } else {
      lines.push(line);
    }
  }
  finish();
  return blocks;
}

function trimLines(text) {
  return text.replace(/^\s*\n/, "").trimEnd();
}

// Shows a text that grows. Only blocks that changed are touched.
export class TextView {
  constructor(element) {
    this.element = element;
    this.shown = [];
  }

  show(text) {
    const blocks = blocksOf(text);
    blocks.forEach((block, i) => {
      const old = this.shown[i];
      if (old && old.isCode === block.isCode && old.language === block.language) {
        if (old.text !== block.text) old.fill((old.text = block.text));
        return;
      }
      const made = block.isCode ? codeBlock(block.language) : paragraph();
      made.fill(block.text);
      if (old) old.element.replaceWith(made.element);
      else this.element.append(made.element);
      this.shown[i] = { ...block, ...made };
    });
    for (const old of this.shown.splice(blocks.length)) old.element.remove();
  }
}

// An element, and the function that gives it its text.
function paragraph() {
  const element = document.createElement("p");
  return { element, fill: (text) => fillParagraph(element, text) };
}

// Put a text into an element, with `code` as elements.
export function fillParagraph(element, text) {
  const parts = text.split(/`([^`\n]+)`/); // every other part stood between backticks
  const nodes = parts.map((part, i) => {
    if (i % 2 === 0) return document.createTextNode(part);
    const code = document.createElement("code");
    code.textContent = part;
    return code;
  });
  element.replaceChildren(...nodes);
}

function codeBlock(language) {
  const node = document.createTextNode("");
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const name = document.createElement("span");
  name.textContent = language || "code";
  const copy = document.createElement("button");
  copy.type = "button";
  copy.className = "quiet";
  copy.textContent = "Copy";
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(node.data);
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "Not allowed"; // the browser refuses it, as without HTTPS
    }
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  caption.append(name, copy);
  const pre = document.createElement("pre");
  const code = document.createElement("code");
  pre.tabIndex = 0; // so that the keyboard can scroll it
  code.append(node);
  pre.append(code);
  figure.append(caption, pre);
  return { element: figure, fill: (text) => (node.data = text) };
}
