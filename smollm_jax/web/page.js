// What the page does without the server: count seconds, copy code, block empty messages.
(() => {
  // Elements of Gradio's that the keyboard can reach, to scroll them or to step through their tokens, and their names.
  const REGIONS = {
    "#answer": "Continuation; the left and right arrow keys go from token to token",
    "#chat .html-container": "Conversation",
    "#runs-table": "Runs",
  };
  const began = new WeakMap(); // when the progress of each note began; its text may change meanwhile

  const tick = () => {
    for (const note of document.querySelectorAll(".note")) {
      const seconds = note.querySelector(".seconds");
      if (!seconds) {
        began.delete(note);
        continue;
      }
      if (!began.has(note)) began.set(note, performance.now());
      const text = `${Math.floor((performance.now() - began.get(note)) / 1000)} s`;
      if (seconds.textContent !== text) seconds.textContent = text;
    }
    for (const [selector, name] of Object.entries(REGIONS)) {
      const region = document.querySelector(selector);
      if (!region || region.tabIndex === 0) continue;
      region.tabIndex = 0;
      region.setAttribute("role", "region");
      region.setAttribute("aria-label", name);
    }
    const tab = document.querySelector("[role=tab][aria-selected=true]");
    if (tab) document.documentElement.dataset.tab = tab.textContent.trim();
  };
  setInterval(tick, 100);

  const copy = async (text) => {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    const box = document.createElement("textarea"); // over plain HTTP browsers offer no clipboard
    box.value = text;
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  };
  document.addEventListener("click", async (event) => {
    const button = event.target.closest?.("button.copy");
    if (!button) return;
    await copy(button.closest(".code").querySelector("code").textContent).then(
      () => (button.textContent = "Copied"),
      () => (button.textContent = "Not copied"),
    );
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });

  // An empty message is not sent: Gradio never sees the click or the key.
  const refuse = (event) => {
    const box = document.querySelector("#message textarea");
    if (box && !box.value.trim()) {
      event.preventDefault();
      event.stopImmediatePropagation();
    }
  };
  addEventListener("click", (event) => event.target.closest?.("#send") && refuse(event), true);
  addEventListener(
    "keydown",
    (event) => event.key === "Enter" && !event.shiftKey && event.target.matches?.("#message textarea") && refuse(event),
    true,
  );
})();
