// The form of settings: what a request takes from it. A field that is left empty is the server's to decide.

import { getJson, savedKey, saveKey } from "/playground/api.js";
import { element } from "/playground/dom.js";

const NUMBERS = [
  "temperature",
  "top_p",
  "top_k",
  "min_p",
  "max_tokens",
  "seed",
  "frequency_penalty",
  "presence_penalty",
  "repetition_penalty",
];
const RETRY_MS = 2000;

export class Settings {
  #form;
  #retry;

  /** `onKey` is called when another API key was given. */
  constructor(form, { onKey }) {
    this.#form = form;
    form.key.value = savedKey();
    form.key.addEventListener("change", () => {
      saveKey(form.key.value.trim());
      this.loadModels();
      onKey();
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    // The key and the model outlive a reset.
    form.addEventListener("reset", () => {
      const { value } = form.model;
      setTimeout(() => Object.assign(form.model, { value }) && Object.assign(form.key, { value: savedKey() }));
    });
  }

  /** Fills the list of models; asks again until there is one. */
  async loadModels() {
    clearTimeout(this.#retry);
    let models = [];
    try {
      models = (await getJson("/v1/models")).data;
      this.#markKey(false);
    } catch (error) {
      this.#markKey(error.status === 401);
      if (error.status === 401 || error.status === 403) return;
    }
    const chosen = this.#form.model.value;
    this.#form.model.replaceChildren(...models.map(({ id }) => element("option", { value: id, textContent: id })));
    if (models.some(({ id }) => id === chosen)) this.#form.model.value = chosen;
    if (!models.length) this.#retry = setTimeout(() => this.loadModels(), RETRY_MS);
  }

  /** Whether all fields hold what they may; says which does not. */
  check() {
    return this.#form.reportValidity();
  }

  /** The body of a request for what follows these messages. */
  request(messages) {
    const form = this.#form;
    const system = form.system.value.trim();
    const body = {
      model: form.model.value,
      messages: system ? [{ role: "system", content: system }, ...messages] : messages,
      stream: true,
      stream_options: { include_usage: true },
    };
    for (const name of NUMBERS) if (form[name].value !== "") body[name] = Number(form[name].value);
    const stop = form.stop.value.split("\n").filter(Boolean);
    if (stop.length) body.stop = stop;
    if (form.logprobs.checked) Object.assign(body, { logprobs: true, top_logprobs: 5 });
    if (form.resumable.checked) body.resumable = true;
    return body;
  }

  /** Asks for the key. */
  askForKey() {
    this.#markKey(true);
    this.#form.key.focus();
  }

  #markKey(wanted) {
    this.#form.key.setAttribute("aria-invalid", wanted);
    document.getElementById("key-note").textContent = wanted ? "This server needs one." : "Stays in this tab.";
  }
}
