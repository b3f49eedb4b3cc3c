// The page: signing in, one conversation, one answer at a time.

import { findModel, streamAnswer } from "/ui/api.js";
import { render } from "/ui/text.js";

const KEY = "nioserve.key";
const $ = (id) => document.getElementById(id);

let key = null;
let model = null;
let conversation = [];
let running = null; // the AbortController of the answer that is being written

function show(signedIn) {
  $("sign-in").hidden = signedIn;
  $("chat").hidden = !signedIn;
  $("actions").hidden = !signedIn;
  $("model").hidden = !signedIn;
  (signedIn ? $("prompt") : $("key")).focus();
}

async function signIn(candidate) {
  $("key-error").hidden = true;
  try {
    model = await findModel(candidate);
  } catch (error) {
    sessionStorage.removeItem(KEY);
    show(false);
    $("key-error").textContent = error.message;
    $("key-error").hidden = false;
    return;
  }
  key = candidate;
  sessionStorage.setItem(KEY, key);
  $("model").textContent = model;
  $("model").title = `Model: ${model}`;
  show(true);
}

function signOut() {
  newChat();
  key = null;
  sessionStorage.removeItem(KEY);
  show(false);
}

function newChat() {
  running?.abort();
  conversation = [];
  $("messages").replaceChildren();
  $("greeting").hidden = false;
  $("prompt").focus();
}

function addMessage(role, text) {
  const message = document.createElement("article");
  message.className = `message ${role}`;
  const who = document.createElement("div");
  who.className = "who";
  who.textContent = role === "user" ? "You" : `${model} · AI`;
  const body = document.createElement("div");
  body.className = "text";
  render(body, text);
  message.append(who, body);
  $("messages").append(message);
  $("messages").scrollTop = $("messages").scrollHeight;
  return message;
}

function addNote(message, text, kind) {
  const note = document.createElement("div");
  note.className = kind;
  note.textContent = text;
  if (kind === "error") note.setAttribute("role", "alert");
  message.append(note);
}

function setBusy(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
}

async function ask(text) {
  const own = conversation;
  own.push({ role: "user", content: text });
  $("greeting").hidden = true;
  addMessage("user", text);
  const message = addMessage("assistant", "");
  const body = message.querySelector(".text");
  message.classList.add("waiting");
  const controller = (running = new AbortController());
  setBusy(true);
  let answer = "";
  try {
    const reason = await streamAnswer({ key, model, messages: own, signal: controller.signal, onText: (piece) => {
      answer += piece;
      const list = $("messages");
      const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
      render(body, answer);
      if (atEnd) list.scrollTop = list.scrollHeight;
    } });
    if (reason === "length") addNote(message, "The answer was cut off: the longest length is reached.", "note");
  } catch (error) {
    if (error.name === "AbortError") addNote(message, "Stopped.", "note");
    else addNote(message, error.message, "error");
  }
  message.classList.remove("waiting");
  // What was answered is part of the conversation; a question without any answer is not, and can be asked again.
  if (answer) own.push({ role: "assistant", content: answer });
  else own.pop();
  if (running === controller) {
    running = null;
    setBusy(false);
  }
}

function grow() {
  const prompt = $("prompt");
  prompt.rows = Math.min(8, prompt.value.split("\n").length);
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const candidate = $("key").value.trim();
  $("key").value = "";
  signIn(candidate);
});

$("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  grow();
  ask(text);
});

$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (event) => {
  // Enter sends, Shift+Enter is a new line; while an input method is composing, Enter is its own.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("prompt-form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("new-chat").addEventListener("click", newChat);
$("sign-out").addEventListener("click", signOut);

const remembered = sessionStorage.getItem(KEY);
if (remembered) signIn(remembered);
else show(false);
