// The calls to the service. Every failure becomes an Error whose message can be shown to people.

const FALLBACK = "The service cannot be reached. Check the network and try again.";

async function request(path, key, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...options.headers, Authorization: `Bearer ${key}` } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(FALLBACK);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const failure = new Error(body?.error?.message ?? `The service answered with status ${response.status}.`);
  failure.status = response.status;
  throw failure;
}

/** Return the name of the model served; this also proves the key. */
export async function findModel(key) {
  const list = await (await request("/v1/models", key)).json();
  return list.data[0].id;
}

/** Call `onText` with each piece of the answer, and return why it ended ("stop" or "length"). */
export async function streamAnswer({ key, model, messages, signal, onText }) {
  const response = await request("/v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model, messages, stream: true }),
    signal,
  });
  let reason = null;
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    if (choice?.delta.content) onText(choice.delta.content);
    reason = choice?.finish_reason ?? reason;
  }
  if (!reason) throw new Error("The connection was lost before the answer was complete.");
  return reason;
}

/** Yield the JSON objects of a stream of server-sent events, up to [DONE]. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Error("The connection was lost before the answer was complete.");
    });
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
