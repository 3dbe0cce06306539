// Requests to the server that sent this page, with the API key where it asks for one.

const KEY = "pellucid-api-key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let asking = null; // the dialog's promise while it is open

// Ask the user for a key. Resolves to true if there is one.
function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const field = document.getElementById("key");
    field.value = "";
    document.getElementById("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, field.value.trim());
      dialog.close("key");
    };
    document.getElementById("key-cancel").onclick = () => dialog.close("");
    dialog.onclose = () => {
      asking = null;
      resolve(dialog.returnValue === "key");
    };
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}

// A response with status 200. Throws ApiError with the server's own message for another one.
// Without `mayAsk` a missing key is an error like others.
export async function request(path, { body, signal, mayAsk = true } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    const options = { headers, signal, cache: "no-store" };
    if (body !== undefined) {
      options.method = "POST";
      options.body = JSON.stringify(body);
      headers["content-type"] = "application/json";
    }
    const response = await fetch(path, options);
    if (response.ok) return response;
    if (response.status === 401) {
      // another request may have brought a key meanwhile
      if (key !== sessionStorage.getItem(KEY)) continue;
      if (mayAsk && (await askForKey())) continue;
    }
    throw new ApiError(response.status, await messageOf(response));
  }
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

// The data of a stream of server-sent events, one object at a time, until [DONE].
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection was closed before the answer was whole");
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new ApiError(found.error.code, found.error.message);
      yield found;
    }
  }
}
