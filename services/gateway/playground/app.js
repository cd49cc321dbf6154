// The page put together: which pane is shown, dark or light, and what the keys do.

import { Chat } from "/playground/chat.js";
import { ClusterView } from "/playground/cluster.js";
import { Settings } from "/playground/settings.js";
import { hide } from "/playground/tokens.js";

const byId = (id) => document.getElementById(id);
const prompt = byId("prompt");

const cluster = new ClusterView(byId("cluster"));
const settings = new Settings(byId("settings"), { onKey: () => cluster.look() });
const chat = new Chat({
  settings: { check: checkSettings, request: (messages) => settings.request(messages), askForKey },
  turns: byId("turns"),
  announcer: byId("announcer"),
  onRunning: showRunning,
});

// --- panes, of which a narrow screen shows one

function showPane(name) {
  document.body.dataset.pane = name;
  for (const button of document.querySelectorAll("[data-show]")) {
    button.setAttribute("aria-pressed", button.dataset.show === name);
  }
  if (name === "chat") chat.showNewest();
  cluster.look();
}

function checkSettings() {
  if (byId("settings").checkValidity()) return true;
  showPane("settings"); // what is wrong must be seen
  return settings.check();
}

function askForKey() {
  showPane("settings");
  settings.askForKey();
}

for (const button of document.querySelectorAll("[data-show]")) {
  button.addEventListener("click", () => showPane(button.dataset.show));
}
matchMedia("(min-width: 1100px)").addEventListener("change", () => cluster.look()); // as style.css has it

// --- dark and light

const THEME = "headrace-theme";

function showTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

const systemTheme = matchMedia("(prefers-color-scheme: dark)");
const followSystem = () => showTheme(localStorage.getItem(THEME) ?? (systemTheme.matches ? "dark" : "light"));
systemTheme.addEventListener("change", followSystem);
byId("theme").addEventListener("click", () => {
  localStorage.setItem(THEME, document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  followSystem();
});

// --- the composer

function showRunning(running) {
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("send").hidden = running;
  byId("stop").hidden = !running;
  if (hadFocus) byId(running ? "stop" : "send").focus();
}

function ask(text) {
  if (text.trim() && chat.ask(text.trim())) prompt.value = "";
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask(prompt.value);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask(prompt.value);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !hide()) chat.stop();
});
byId("stop").addEventListener("click", () => chat.stop());
byId("clear").addEventListener("click", () => {
  chat.clear();
  prompt.focus();
});
for (const example of document.querySelectorAll(".examples button")) {
  example.addEventListener("click", () => ask(example.textContent));
}

followSystem();
showPane("chat");
settings.loadModels();
