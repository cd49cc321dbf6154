// The live view of the cluster: asks every two seconds while somebody can see it.

import { getJson } from "/playground/api.js";
import { element, grouped, money, percent, plural } from "/playground/dom.js";

const EVERY_MS = 2000;

export class ClusterView {
  #pane;
  #timer;
  #asking = null;
  #cards = new Map(); // by worker and incarnation
  #problem = element("p", { class: "notice", hidden: true });
  #totals = element("dl", { class: "totals" });
  #workers = element("div", { class: "workers" });

  constructor(pane) {
    this.#pane = pane;
    pane.append(element("h2", { textContent: "Cluster" }), this.#problem, this.#totals, this.#workers);
    document.addEventListener("visibilitychange", () => this.look());
  }

  /** Looks now, and again for as long as it can be seen. */
  async look() {
    clearTimeout(this.#timer);
    this.#asking?.abort();
    if (document.hidden || !this.#pane.checkVisibility()) return;
    const asking = (this.#asking = new AbortController());
    try {
      this.#show(await getJson("/v1/cluster", asking.signal));
      this.#say("");
    } catch (error) {
      if (asking.signal.aborted) return;
      this.#say(error.message);
    }
    this.#timer = setTimeout(() => this.look(), EVERY_MS);
  }

  #say(problem) {
    this.#problem.textContent = problem;
    this.#problem.hidden = !problem;
    this.#pane.classList.toggle("stale", Boolean(problem));
  }

  #show(cluster) {
    const totals = Object.entries(totalsOf(cluster)).filter(([, value]) => value !== "");
    this.#totals.replaceChildren(
      ...totals.map(([name, value]) =>
        element("div", { "data-name": name }, element("dt", { textContent: name }), element("dd", { textContent: value })),
      ),
    );
    const before = this.#cards;
    this.#cards = new Map();
    for (const worker of cluster.workers) {
      const key = `${worker.id} ${worker.incarnation}`;
      const card = before.get(key) ?? new WorkerCard(worker);
      card.update(worker);
      this.#cards.set(key, card);
      before.delete(key);
      if (!card.node.isConnected) this.#workers.append(card.node);
    }
    for (const gone of before.values()) gone.node.remove();
  }
}

class WorkerCard {
  #state = element("span", { class: "state" });
  #role = element("span", { class: "role" });
  #batch = new Meter("Batch");
  #kv = new Meter("KV blocks");
  #hits = new Meter("Prefix hits");
  #facts = element("p", { class: "facts" });

  constructor({ id, model }) {
    this.node = element(
      "article",
      { class: "worker", "aria-label": `Worker ${id}` },
      element("header", {}, element("h3", { textContent: id }), this.#role, this.#state),
      element("p", { class: "model", textContent: model }),
      this.#batch.node,
      this.#kv.node,
      this.#hits.node,
      this.#facts,
    );
  }

  update(worker) {
    const { running, waiting, max_sequences: most, prefix_hit_tokens: hits, prefix_queried_tokens: asked } = worker;
    this.#state.textContent = worker.state.replaceAll("_", " ");
    this.#state.className = `state ${worker.state}`;
    this.#role.textContent = worker.role;
    this.#batch.update(running, most, `${running} of ${most}${waiting ? `, ${waiting} waiting` : ""}`);
    const { kv_blocks_used: used, kv_blocks_total: total } = worker;
    this.#kv.update(used, total, `${grouped(used)} of ${grouped(total)}`);
    this.#hits.update(hits, asked, asked ? percent(hits / asked) : "none yet");
    this.#facts.textContent = [
      `room for ${worker.credits.sequences}`,
      worker.prefill_tokens_per_s ? `prefill ${Math.round(worker.prefill_tokens_per_s)} tokens/s` : "",
      worker.price_per_hour == null ? "" : `${money(worker.price_per_hour)}/h`,
    ].filter(Boolean).join(" · ");
  }
}

class Meter {
  constructor(label) {
    this.value = element("span");
    this.bar = element("div", { class: "bar", role: "meter", "aria-label": label, "aria-valuemin": 0 });
    this.node = element("div", { class: "meter" }, element("span", { textContent: label }), this.value, this.bar);
  }

  update(value, most, text) {
    this.value.textContent = text;
    this.bar.style.setProperty("--part", most ? Math.min(1, value / most) : 0);
    this.bar.setAttribute("aria-valuenow", value);
    this.bar.setAttribute("aria-valuemax", most);
    this.bar.setAttribute("aria-valuetext", text);
  }
}

const sum = (items, value) => items.reduce((total, item) => total + (value(item) ?? 0), 0);

function totalsOf({ gateway, schedulers, models, workers }) {
  const healthy = workers.filter(({ state }) => state === "healthy").length;
  const priced = workers.filter((worker) => worker.price_per_hour != null);
  const queues = models.map(({ queue }) => queue);
  const classes = ["high", "normal", "low"].map((name) => `${sum(queues, (queue) => queue?.[name])} ${name}`);
  return {
    workers: healthy === workers.length ? `${healthy} healthy` : `${healthy} of ${workers.length} healthy`,
    schedulers: `${schedulers.length}`,
    running: plural(sum(workers, ({ running }) => running), "sequence"),
    "this gateway": plural(gateway.active_requests, "request"),
    queued: queues.includes(null) ? "unknown: Redis is away" : classes.join(", "),
    "cost per hour": priced.length ? money(sum(priced, (worker) => worker.price_per_hour)) : "",
  };
}
