// The conversation: what was said, and the answer that is being streamed.

import { ApiError, cancelAnswer, streamChat } from "/playground/api.js";
import { Answer } from "/playground/answer.js";
import { element } from "/playground/dom.js";

const NEAR_THE_END_PX = 80;

export class Chat {
  #settings;
  #turns; // the element
  #welcome;
  #announcer;
  #onRunning;
  #said = []; // {question, answer}
  #running = null; // an AbortController

  /** `onRunning(running)` is told when an answer begins and when it has ended. */
  constructor({ settings, turns, announcer, onRunning }) {
    this.#settings = settings;
    this.#turns = turns;
    this.#welcome = turns.firstElementChild;
    this.#announcer = announcer;
    this.#onRunning = onRunning;
  }

  get running() {
    return this.#running !== null;
  }

  /** Asks, unless an answer is under way or the settings are wrong. Says whether it did. */
  ask(question) {
    if (this.running || !this.#settings.check()) return false;
    this.#welcome.remove();
    const text = element("div", { class: "text", textContent: question });
    this.#turns.append(element("article", { class: "turn question", "aria-label": "You" }, text));
    this.#said.push({ question, answer: null });
    this.#answer();
    return true;
  }

  /** Scrolls to the end: what is not displayed forgets where it was. */
  showNewest() {
    this.#turns.scrollTop = this.#turns.scrollHeight;
  }

  stop() {
    this.#running?.abort();
  }

  clear() {
    this.stop();
    this.#said = [];
    this.#turns.replaceChildren(this.#welcome);
  }

  #regenerate() {
    if (this.running || !this.#settings.check()) return;
    this.#said.at(-1).answer.node.remove();
    this.#answer();
  }

  #answer() {
    const turn = this.#said.at(-1);
    const body = this.#settings.request(this.#messages());
    turn.answer = new Answer(body.model);
    this.#turns.append(turn.answer.node);
    this.showNewest();
    this.#stream(turn.answer, body);
  }

  #messages() {
    return this.#said.flatMap(({ question, answer }, index) => [
      { role: "user", content: question },
      ...(answer && index < this.#said.length - 1 ? [{ role: "assistant", content: answer.text }] : []),
    ]);
  }

  async #stream(answer, body) {
    const running = new AbortController();
    this.#running = running;
    this.#onRunning(true);
    this.#announcer.textContent = "Answering";
    for (const { answer: earlier } of this.#said) earlier?.actions.replaceChildren(...copying(earlier));
    let problem = "";
    try {
      for await (const chunk of streamChat(body, running.signal, answer.lastEventId)) {
        this.#followingTheEnd(() => answer.add(chunk));
      }
    } catch (error) {
      problem = this.#told(error, answer);
    }
    this.#running = null;
    this.#onRunning(false);
    this.#ended(answer, body, problem);
  }

  /** What to say of an error; a stopped answer that is recorded would go on by itself. */
  #told(error, answer) {
    if (error.name === "AbortError") {
      if (answer.lastEventId) cancelAnswer(answer.lastEventId.replace(/:\d+$/, "")).catch(() => {});
      answer.lastEventId = "";
      return "Stopped.";
    }
    if (error.status === 401) this.#settings.askForKey();
    if (error instanceof ApiError) return error.message;
    console.error(error);
    return "This page failed to show the answer.";
  }

  #ended(answer, body, problem) {
    this.#followingTheEnd(() => {
      answer.end(problem);
      const actions = copying(answer);
      if (problem && answer.lastEventId) {
        actions.push(button("Resume", () => {
          if (this.running) return;
          answer.resume();
          this.#stream(answer, body);
        }));
      }
      if (this.#said.at(-1)?.answer === answer) actions.push(button("Regenerate", () => this.#regenerate()));
      answer.actions.replaceChildren(...actions);
    });
    this.#announcer.textContent = problem ? "" : answer.text; // the problem is an alert already
  }

  /** Keeps the newest words in sight, unless somebody reads further up. */
  #followingTheEnd(change) {
    const turns = this.#turns;
    const follows = turns.scrollHeight - turns.scrollTop - turns.clientHeight < NEAR_THE_END_PX;
    change();
    if (follows) turns.scrollTop = turns.scrollHeight;
  }
}

/** Browsers have no clipboard for pages that came over plain HTTP from another machine. */
function copying(answer) {
  if (!answer.text || !navigator.clipboard) return [];
  const copy = button("Copy", async () => {
    await navigator.clipboard.writeText(answer.text);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  return [copy];
}

function button(text, onclick) {
  return element("button", { type: "button", class: "quiet", textContent: text, onclick });
}
