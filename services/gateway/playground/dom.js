// Elements and numbers, as the other modules write them. What comes from elsewhere goes in as text, never as markup.

/** An element with properties (`class` and `aria-...` among them) and children, which are elements or text. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** 0.0042 s is "4.2 ms", 1.5 s is "1.50 s", and what took time did not take "0.0 ms". */
export function duration(seconds) {
  if (seconds >= 1) return `${seconds.toFixed(2)} s`;
  if (seconds > 0 && seconds < 0.0001) return "< 0.1 ms";
  const ms = seconds * 1000;
  return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

/** 0.1234 is "12.3 %", and what is not nothing is not "0 %". */
export function percent(part) {
  if (part > 0 && part < 0.001) return "< 0.1 %";
  return `${(part * 100).toFixed(part > 0 && part < 0.9995 ? 1 : 0)} %`;
}

/** 12345 is "12,345". */
export function grouped(count) {
  return count.toLocaleString("en");
}

export function plural(count, word) {
  return `${grouped(count)} ${word}${count === 1 ? "" : "s"}`;
}

/** Money has no unit here: prices are in whatever the operator's are in. */
export function money(amount) {
  return amount === 0 || amount >= 0.01 ? amount.toFixed(2) : amount.toPrecision(2);
}
