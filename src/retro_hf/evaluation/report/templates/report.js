"use strict";
// Chunks open without this script; it adds numbers under the pointer, "open all", the arrow
// keys, and opens the chunk that a link names.
const readout = document.getElementById("readout");
const show = (event) => {
  const token = event.target.closest(".token[title]");
  readout.hidden = !token;
  if (token) readout.textContent = `${JSON.stringify(token.textContent)}  ${token.title}`;
};
document.addEventListener("pointerover", show);
document.addEventListener("click", show);

for (const button of document.querySelectorAll("button.all")) {
  const chunks = button.closest(".trace").querySelectorAll(".chunk");
  button.hidden = false;
  button.addEventListener("click", () => {
    const open = ![...chunks].every((chunk) => chunk.open);
    for (const chunk of chunks) chunk.open = open;
    button.textContent = open ? "close all chunks" : "open all chunks";
  });
}

const follow = () => {
  const chunk = document.getElementById(location.hash.slice(1));
  if (chunk?.matches(".chunk")) chunk.open = true;
};
window.addEventListener("hashchange", follow);
follow();

document.addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step || !event.target.matches(".chunk > summary")) return;
  const summaries = [...document.querySelectorAll(".chunk > summary")];
  const next = summaries[summaries.indexOf(event.target) + step];
  if (!next) return;
  event.preventDefault();
  next.focus();
});
