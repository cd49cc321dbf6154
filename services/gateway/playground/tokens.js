// Tokens tinted by how likely they were, with the likeliest ones of a place in a tooltip: by pointer, or by arrow keys.

import { element, percent } from "/playground/dom.js";

const MOST_SURPRISE = 5; // nats; less likely tokens, below 0.7 %, look alike
const tooltip = document.getElementById("tooltip");
const visible = (token) => token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "␣") || "∅";

export class Tokens {
  #decoder = new TextDecoder();
  #ends = []; // where each token ends in the text, in UTF-16 units
  #shown = 0; // tokens that the text has reached

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
    return this.#ends.length;
  }

  /** Takes entries of `logprobs.content`. Several tokens may make one character, which the last of them shows. */
  add(entries) {
    for (const entry of entries) {
      const text = this.#decoder.decode(Uint8Array.from(entry.bytes), { stream: true });
      const token = element("span", { class: "token beyond", textContent: text, tabIndex: this.count ? -1 : 0 });
      token.entry = entry;
      token.style.setProperty("--unlikely", Math.min(1, -entry.logprob / MOST_SURPRISE));
      this.#ends.push((this.#ends.at(-1) ?? 0) + text.length);
      this.node.append(token);
    }
  }

  /** The answer's text has that many characters: tokens beyond it are held back, or end it and are no part of it. */
  reach(length) {
    while (this.#shown < this.count && this.#ends[this.#shown] <= length) {
      this.node.children[this.#shown++].classList.remove("beyond");
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
