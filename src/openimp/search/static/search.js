"use strict";
// Searches without loading the page again, uploads files, records sounds, and plays animations. The server renders all
// HTML, and the URL is the whole state. Without this script, texts, filters and links work by loading the page again.

const $ = (selector, within = document) => within.querySelector(selector);
const RECORDED_SECONDS = 30;
let newest = 0; // number of the newest request; answers to older ones are dropped
let pushes = false; // whether the newest request makes a new entry of the browser's history
let recorder = null;
let asking = false; // for the microphone
let entered = location.search; // the query of the current entry of the browser's history

function explain(problem = "") {
  $("#problem p").textContent = problem;
  $("#problem").hidden = !problem;
}

// Fetches from the server. An error's message is a sentence for the user.
async function ask(url, options) {
  try {
    return await fetch(url, options);
  } catch {
    throw new Error("The server does not answer. Check that openimp serve is still running, then try again.");
  }
}

// Shows the page of a URL in place of this one. `entry` is what becomes of the browser's history: a new entry (push), the
// same entry with another URL (replace), or nothing. `whole` replaces the form, too.
async function go(url, { entry = "push", whole = false } = {}) {
  const own = ++newest;
  if (entry === "push" && new URL(url, location).href === location.href) entry = "replace"; // As browsers do.
  if (entry === "replace" && pushes) entry = "push"; // The request that this one overtakes has made no entry.
  pushes = entry === "push";
  document.body.classList.add("busy");
  explain();
  try {
    const answer = await ask(url);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (own !== newest) return;
    if (!$("#query", page)) throw new Error(page.body.textContent.trim() || `The server failed: ${answer.status}.`);
    if (whole && recorder) discard();
    for (const id of whole ? ["query", "results"] : ["parts", "results"]) $(`#${id}`).replaceWith($(`#${id}`, page));
    $("#status").textContent = $("#status", page).textContent;
    document.title = page.title;
    if (entry) {
      history[`${entry}State`](null, "", url);
      entered = location.search;
    }
    if (whole) reveal();
  } catch (error) {
    if (own === newest) explain(error.message);
  } finally {
    if (own === newest) {
      pushes = false;
      document.body.classList.remove("busy");
    }
  }
}

// The URL of the form, without values that change nothing.
function address(changes = {}) {
  const fields = new URLSearchParams(new FormData($("#query")));
  if (!Number(fields.get("min"))) fields.delete("min");
  if (fields.get("by") === "both") fields.delete("by");
  for (const name of ["q", "under", "since", "until"]) if (!fields.get(name)) fields.delete(name);
  for (const [name, value] of Object.entries(changes)) value ? fields.set(name, value) : fields.delete(name);
  const query = fields.toString(); // Not `fields.size`, which Safari has only since 2023.
  return query ? `/?${query}` : "/";
}

// Searches with a file instead of other files and items. The text and the filters are kept.
async function upload(file, name, modality = "") {
  if (file.size > Number($("#query").dataset.limit)) {
    explain(`Cannot search with ${name}: it is larger than ${Math.floor($("#query").dataset.limit / 2 ** 20)} MiB.`);
    return;
  }
  explain();
  const seen = newest;
  const status = $("#status").textContent;
  $("#status").textContent = `Reading ${name} …`;
  try {
    const answer = await ask(`/uploads?${new URLSearchParams({ name, modality })}`, { method: "POST", body: file });
    const found = await answer.json().catch(() => ({ error: `The server failed: ${answer.status}.` }));
    if (found.error) throw new Error(found.error);
    await go(address({ more: "", less: "", file: found.id }));
  } catch (error) {
    if (seen === newest) $("#status").textContent = status; // Otherwise a newer search has set it.
    explain(error.message);
  }
}

// Ends a recording that is not wanted any more.
function discard() {
  const own = recorder;
  recorder = null;
  own.stop();
}

async function record(button) {
  if (recorder) return recorder.stop();
  if (asking) return; // Otherwise a second click would start a recording that nothing ends.
  let stream;
  asking = true;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    return explain(`The microphone cannot be used: ${error.message}.`);
  } finally {
    asking = false;
  }
  if (!button.isConnected) return stream.getTracks().forEach((track) => track.stop()); // The form was replaced.
  const parts = [];
  const own = new MediaRecorder(stream);
  recorder = own;
  own.ondataavailable = (event) => parts.push(event.data);
  own.onstop = () => {
    stream.getTracks().forEach((track) => track.stop());
    if (recorder !== own) return; // It was discarded.
    recorder = null;
    button.classList.remove("recording");
    button.textContent = "Record";
    upload(new Blob(parts, { type: own.mimeType }), "recording", button.dataset.modality);
  };
  recorder.start();
  button.classList.add("recording");
  button.textContent = "Stop and search";
  setTimeout(() => own === recorder && own.stop(), RECORDED_SECONDS * 1000);
}

function play(button, on) {
  const image = $("img", button);
  image.dataset.still ??= image.src;
  image.src = on ? button.dataset.play : image.dataset.still;
  button.setAttribute("aria-pressed", on);
}

// Shows what works only with a script.
function reveal() {
  document.querySelectorAll(".inputs").forEach((element) => (element.hidden = false));
  // Browsers allow the microphone only on https and on loopback.
  if ($("#record")) $("#record").hidden = !(window.MediaRecorder && navigator.mediaDevices);
}

document.addEventListener("submit", (event) => {
  event.preventDefault();
  go(address());
});
document.addEventListener("click", async (event) => {
  const link = event.target.closest("a[data-go]"), button = event.target.closest("button");
  if (link && $("#query") && !(event.ctrlKey || event.metaKey || event.shiftKey)) {
    event.preventDefault();
    const known = document.querySelectorAll(".card").length, isMore = link.closest(".next");
    await go(link.href);
    const firstNew = isMore && document.querySelectorAll(".card")[known];
    if (firstNew) firstNew.tabIndex = -1; // The card itself: its first link may be hidden, and a button would play.
    // The link is gone. The keyboard continues at the results or, after "Show more results", at the first new one.
    (firstNew || $("#status")).focus({ preventScroll: true });
    if (!firstNew) scrollTo(0, 0);
  } else if (button?.closest("#problem")) explain();
  else if (button?.id === "choose") $("#file").click();
  else if (button?.id === "record") record(button);
  else if (button?.dataset.play) play(button, button.getAttribute("aria-pressed") !== "true");
});
document.addEventListener("change", ({ target }) => {
  if (target.id === "file" && target.files.length) {
    const [file] = target.files;
    target.value = ""; // Otherwise choosing the same file again would not be a change.
    upload(file, file.name);
  } else if (target.name === "min") go(address(), { entry: "replace" }); // Else "back" would pass each position of the slider.
  else if (target.closest("#query .filters")) $("#query").requestSubmit();
});
document.addEventListener("input", ({ target }) => {
  if (target.name === "min") target.nextElementSibling.textContent = Number(target.value) ? Number(target.value).toFixed(2) : "any";
});
document.addEventListener("paste", (event) => {
  // Office puts a picture of copied cells beside their text.
  const isText = ["text/plain", "text/html"].every((type) => event.clipboardData.types.includes(type));
  const file = $("#query") && !isText && event.clipboardData.files[0];
  if (file) event.preventDefault(), upload(file, file.name);
});
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    if (!$("#query") || ![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    document.body.classList.toggle("dropping", name === "dragenter" || name === "dragover");
    const file = name === "drop" && event.dataTransfer.files[0];
    if (file) upload(file, file.name);
  });
}
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) {
  for (const [name, on] of [["pointerover", true], ["pointerout", false], ["focusin", true], ["focusout", false]]) {
    document.addEventListener(name, (event) => {
      const button = event.target.closest?.("[data-play]");
      // A tap is a click, which plays or stops by itself.
      const counts = name.startsWith("pointer") ? event.pointerType === "mouse" : !on || button?.matches(":focus-visible");
      if (button && counts && !button.contains(name.startsWith("pointer") ? event.relatedTarget : null)) play(button, on);
    });
  }
}
document.addEventListener("error", ({ target }) => {
  if (target.matches?.("video, audio")) target.closest(".card").classList.add("fails");
}, true);
addEventListener("popstate", () => {
  const moved = location.search !== entered; // A link within the page changes only the hash.
  entered = location.search;
  if ($("#query") && moved) go(location.href, { entry: null, whole: true });
});
reveal();
