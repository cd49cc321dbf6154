// Tokens tinted by how likely they were, with the likeliest ones of a place in a tooltip: by pointer, or by arrow keys.

import { element, percent } from "/playground/dom.js";

const MOST_SURPRISE = 5; // nats; less likely tokens, below 0.7 %, look alike
const tooltip = document.getElementById("tooltip");
const visible = (token) => token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "␣") || "∅";

export class Tokens {
  #decoder = new TextDecoder();
  #looked = 0; // tokens that were looked for in the text
  #reached = 0; // characters of the text that tokens were found for

  constructor() {
    this.node = element("div", {
      class: "tokens",
      role: "group",
      "aria-label": "Answer by token; arrow keys move between tokens",
    });
    this.node.addEventListener("keydown", (event) => this.#move(event));
    this.node.addEventListener("focusin", (event) => show(event.target));
    this.node.addEventListener("focusout", hide);
    this.node.addEventListener("pointerover", (event) => show(event.target));
    this.node.addEventListener("pointerout", hide);
  }

  get count() {
    return this.node.children.length;
  }

  /** Takes entries of `logprobs.content`. Several tokens may make one character, which the last of them shows. */
  add(entries) {
    for (const entry of entries) {
      const text = this.#decoder.decode(Uint8Array.from(entry.bytes), { stream: true });
      const token = element("span", { class: "token beyond", textContent: text, tabIndex: this.count ? -1 : 0 });
      token.entry = entry;
      token.style.setProperty("--unlikely", Math.min(1, -entry.logprob / MOST_SURPRISE));
      this.node.append(token);
    }
  }

  /** The answer's text so far. Tokens that are no part of it are special ones, or held back, or cut off by a stop string. */
  find(text) {
    for (; this.#looked < this.count; this.#looked++) {
      const token = this.node.children[this.#looked];
      if (text.startsWith(token.textContent, this.#reached)) {
        token.classList.remove("beyond");
        this.#reached += token.textContent.length;
      } else if (token.textContent.startsWith(text.slice(this.#reached))) {
        return; // the rest of it may still come
      }
    }
  }

  #move(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const from = [...this.node.children].indexOf(document.activeElement);
    const to = { Home: 0, End: this.count - 1 }[event.key] ?? (step && from + step);
    const token = this.node.children[to];
    if (from < 0 || !token) return;
    event.preventDefault();
    this.node.children[from].tabIndex = -1;
    token.tabIndex = 0;
    token.focus();
  }
}

/** Hides the tooltip; says whether there was one. */
export function hide() {
  const shown = !tooltip.hidden;
  tooltip.hidden = true;
  document.querySelector("[aria-describedby=tooltip]")?.removeAttribute("aria-describedby");
  return shown;
}

function show(token) {
  hide();
  if (!token.entry) return;
  const { entry } = token;
  const rivals = entry.top_logprobs.filter((rival) => rival.token !== entry.token);
  const rows = [entry, ...rivals].sort((one, other) => other.logprob - one.logprob);
  tooltip.replaceChildren(...rows.map((row) => candidate(row, row === entry)));
  token.setAttribute("aria-describedby", "tooltip");
  tooltip.hidden = false;
  place(token.getClientRects()[0] ?? token.getBoundingClientRect());
}

function candidate({ token, logprob }, chosen) {
  const likelihood = Math.exp(logprob);
  const row = element(
    "div",
    { class: chosen ? "candidate chosen" : "candidate", title: `log-probability ${logprob.toFixed(3)}` },
    element("code", { textContent: visible(token) }),
    element("span", { textContent: percent(likelihood) }),
  );
  row.style.setProperty("--part", likelihood);
  return row;
}

function place(beside) {
  const { offsetWidth: width, offsetHeight: height } = tooltip;
  const below = beside.bottom + 6 + height < innerHeight;
  tooltip.style.setProperty("left", `${Math.max(8, Math.min(beside.left, innerWidth - width - 8))}px`);
  tooltip.style.setProperty("top", `${Math.max(8, below ? beside.bottom + 6 : beside.top - height - 6)}px`);
}
