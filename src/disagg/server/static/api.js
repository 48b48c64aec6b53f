// Talking to the server, with the API key if it wants one. The key stays in this tab.

const STORED = "disagg-key";

function headers() {
  const key = sessionStorage.getItem(STORED);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function checked(response) {
  if (response.ok) return response;
  const wanted = response.status === 401;
  document.getElementById("key").hidden = !wanted;
  const body = await response.json().catch(() => ({}));
  throw Object.assign(new Error(body.error?.message ?? `${response.status} ${response.statusText}`), { keyWanted: wanted });
}

/** The JSON at `path`. Throws an Error with the server's sentence; `keyWanted` if it asks for a key. */
export async function ask(path) {
  const response = await checked(await fetch(path, { headers: headers(), cache: "no-store" }));
  return response.json();
}

/** Post JSON and yield the events of the streamed answer, parsed. Throws as `ask`. */
export async function* stream(path, body) {
  const sent = { ...headers(), "Content-Type": "application/json" };
  const response = await checked(await fetch(path, { method: "POST", headers: sent, body: JSON.stringify(body) }));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      const news = JSON.parse(data);
      if (news.error) throw new Error(news.error.message);
      yield news;
    }
  }
}

/** Let the form keep the key. */
export function onKey(form) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(STORED, form.elements.key.value.trim());
    form.reset();
    form.hidden = true;
  });
}
