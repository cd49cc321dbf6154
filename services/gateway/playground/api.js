// The gateway's HTTP: requests with the key of this tab, errors as sentences, answers as streams of events.

const KEY = "headrace-key";

export const savedKey = () => sessionStorage.getItem(KEY) ?? "";

export function saveKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** What went wrong, in a sentence that a person can act on. `status` is 0 where no answer came. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function getJson(path, signal) {
  return (await send(path, { signal })).json();
}

/** Ends a recorded answer; one that has ended already stays as it is. */
export async function cancelAnswer(answerId) {
  await send(`/v1/answers/${encodeURIComponent(answerId)}/cancel`, { method: "POST" });
}

/**
 * The chunks of a streamed chat, each with the `id` of its event. Throws ApiError, and an AbortError once `signal` is
 * aborted. With `lastEventId`, those after it.
 */
export async function* streamChat(body, signal, lastEventId) {
  const headers = { "content-type": "application/json", "x-headrace-timings": "1" };
  if (lastEventId) headers["last-event-id"] = lastEventId;
  const answer = await send("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  let done = false;
  for await (const { id, data } of events(answer.body)) {
    done = data === "[DONE]";
    if (done) continue;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(200, chunk.error.message);
    yield { ...chunk, eventId: id };
  }
  if (!done) throw lost();
}

async function send(path, { headers = {}, ...options } = {}) {
  const key = savedKey();
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: key ? { ...headers, authorization: `Bearer ${key}` } : headers });
  } catch (error) {
    throw error instanceof TypeError ? new ApiError(0, "The server cannot be reached.") : error;
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

async function refusal(answer) {
  const { message = `The server answered ${answer.status}.`, code } = (await answer.json().catch(() => ({}))).error ?? {};
  const wait = Number(answer.headers.get("retry-after"));
  const again = wait ? `try again in ${wait === 1 ? "a second" : `${wait} seconds`}` : "try again later";
  if (answer.status === 401) {
    return new ApiError(401, savedKey() ? "The server does not know this API key." : "The server needs an API key.");
  }
  if (answer.status === 429) {
    const ofKey = code === "rate_limit_exceeded" || code === "insufficient_quota";
    return new ApiError(429, `${ofKey ? "This key's limit is reached" : "The server is busy"}: ${again}.`);
  }
  return new ApiError(answer.status, message);
}

function lost() {
  return new ApiError(0, "The connection was lost before the answer ended.");
}

/** The server-sent events of a body. Comments keep a connection open and say nothing. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw error instanceof TypeError ? lost() : error;
      });
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      yield* parts.map(parseEvent).filter((event) => event.data);
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

function parseEvent(text) {
  const event = { id: "", data: "" };
  for (const line of text.split("\n")) {
    const [, name, value] = line.match(/^(id|data): ?(.*)$/) ?? [];
    if (name) event[name] = value;
  }
  return event;
}
