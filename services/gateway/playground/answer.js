// One answer on the page: its text, how fast it comes, what it took, and where its time went.

import { duration, element, money, plural } from "/playground/dom.js";
import { Tokens } from "/playground/tokens.js";

export class Answer {
  text = "";
  /** Of the newest event of a resumable answer; what follows it can be asked for. */
  lastEventId = "";
  ended = false;
  #plain = document.createTextNode("");
  #tokens = null;
  #events = 0;
  #asked = performance.now();
  #first = 0;
  #newest = 0;
  #usage = null;
  #ending = "";
  #frame = 0;

  constructor(model) {
    this.body = element("div", { class: "text" }, this.#plain);
    this.stats = element("dl", { class: "stats" });
    this.budget = element("div", { class: "budget", hidden: true });
    this.notice = element("p", { class: "notice", role: "alert", hidden: true });
    this.actions = element("div", { class: "actions" });
    this.node = element(
      "article",
      { class: "turn answer", "aria-label": "Answer", "aria-busy": "true" },
      element("h3", { textContent: model }),
      this.body,
      this.notice,
      element("footer", {}, this.stats, this.budget, this.actions),
    );
    this.#draw();
  }

  /** Takes a chunk of the stream. */
  add({ choices: [choice], usage, timings, eventId }) {
    if (eventId) this.lastEventId = eventId;
    if (usage) this.#usage = usage;
    if (timings) this.#showBudget(timings);
    if (choice) this.#addChoice(choice);
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  /** The stream is over, well or with what went wrong. */
  end(problem = "") {
    this.ended = true;
    this.node.setAttribute("aria-busy", "false");
    this.notice.textContent = problem;
    this.notice.hidden = !problem;
    this.#draw();
  }

  /** The stream goes on. */
  resume() {
    this.ended = false;
    this.node.setAttribute("aria-busy", "true");
    this.notice.hidden = true;
  }

  #addChoice({ delta, logprobs, finish_reason: ending }) {
    const content = delta?.content ?? "";
    if (content || logprobs?.content?.length) {
      this.#newest = performance.now();
      this.#first ||= this.#newest;
      this.#events += 1;
    }
    this.text += content;
    if (logprobs && !this.#tokens) {
      this.#tokens = new Tokens();
      this.body.replaceChildren(this.#tokens.node);
    }
    this.#tokens?.add(logprobs?.content ?? []);
    this.#tokens?.find(this.text);
    this.#plain.data = this.text;
    if (ending) this.#ending = ending;
  }

  #draw() {
    this.#frame = 0;
    const count = this.#usage?.completion_tokens ?? this.#tokens?.count ?? this.#events;
    const seconds = (this.#newest - this.#first) / 1000;
    const shown = {
      "first token": this.#first || !this.ended ? duration(((this.#first || performance.now()) - this.#asked) / 1000) : "",
      speed: seconds > 0 && count > 1 ? `${((count - 1) / seconds).toFixed(1)} tokens/s` : "",
      output: count ? plural(count, "token") : "",
      ...(this.#usage && usageStats(this.#usage)),
      finish: this.#ending,
    };
    this.stats.replaceChildren(
      ...Object.entries(shown)
        .filter(([, value]) => value)
        .map(([name, value]) =>
          element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value })),
        ),
    );
    // The wait for the first token is told while it lasts.
    if (!this.#first && !this.ended) this.#frame = requestAnimationFrame(() => this.#draw());
  }

  /** `timings`: milliseconds by phase, as `decode_ms`, and their `total_ms`. */
  #showBudget({ total_ms: total, ...timings }) {
    const bar = element("div", { class: "stack", "aria-hidden": "true" });
    const legend = element("ul", { "aria-label": `Time budget, ${duration(total / 1000)}` });
    for (const [key, ms] of Object.entries(timings).filter(([, ms]) => ms > 0)) {
      const name = key.replace(/_ms$/, "");
      const text = `${name} ${duration(ms / 1000)}`;
      const part = element("span", { class: `phase ${name}`, title: text });
      part.style.setProperty("flex-grow", ms / total);
      bar.append(part);
      legend.append(element("li", { class: `phase ${name}`, textContent: text }));
    }
    this.budget.replaceChildren(bar, legend);
    this.budget.hidden = false;
  }
}

function usageStats({ prompt_tokens: prompt, prompt_tokens_details: details, cost }) {
  return {
    prompt: plural(prompt, "token"),
    cached: details?.cached_tokens ? plural(details.cached_tokens, "token") : "",
    cost: typeof cost === "number" ? money(cost) : "",
  };
}
