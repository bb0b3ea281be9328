// The tooltip of a token: one element, filled with text only, beside the token under the pointer, the last clicked, or
// the one that the arrow keys went to.
(() => {
  const tip = document.createElement("div");
  tip.id = "token-tip";
  tip.setAttribute("role", "status"); // read out as the arrow keys go from token to token
  const place = () => document.body.append(tip);
  document.body ? place() : addEventListener("DOMContentLoaded", place);
  let pinned = null;

  const visible = (text) => text.replaceAll(" ", "\u2423").replaceAll("\n", "\u23ce").replaceAll("\t", "\u21e5") || "(end)";

  const row = (text, share, chosen) => {
    const line = document.createElement("div");
    line.className = chosen ? "row chosen" : "row";
    line.style.setProperty("--share", `${share}%`);
    for (const part of [visible(text), `${share.toFixed(1)} %`]) {
      const cell = document.createElement("span");
      cell.textContent = part;
      line.append(cell);
    }
    return line;
  };

  const show = (token) => {
    const about = JSON.parse(token.dataset.about);
    const head = document.createElement("div");
    head.className = "head";
    head.textContent = "what might have come here";
    const rows = about.others.map(([text, share]) => row(text, share, text === about.text));
    if (!about.others.some(([text]) => text === about.text)) rows.push(row(about.text, about.p, true));
    tip.replaceChildren(head, ...rows);
    tip.classList.add("open");
    const at = token.getClientRects()[0];
    const size = tip.getBoundingClientRect();
    const left = Math.max(8, Math.min(at.left, innerWidth - size.width - 8));
    const below = at.bottom + 6 + size.height < innerHeight;
    tip.style.left = `${left}px`;
    tip.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - size.height - 6)}px`;
  };
  const hide = () => {
    pinned?.classList.remove("picked");
    pinned = null;
    tip.classList.remove("open");
  };

  const pin = (token) => {
    hide();
    pinned = token;
    token.classList.add("picked");
    show(token);
  };

  document.addEventListener("mouseover", (event) => {
    if (pinned?.isConnected) return;
    const token = event.target.closest?.(".token[data-about]");
    token ? show(token) : hide();
  });
  document.addEventListener("click", (event) => {
    const token = event.target.closest?.(".token[data-about]");
    const again = token && token === pinned;
    token && !again ? pin(token) : hide();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!way || !event.target.matches("#answer, .card")) return;
    const tokens = [...event.target.querySelectorAll(".token[data-about]")];
    const place = tokens.indexOf(pinned);
    const next = tokens[place < 0 ? (way > 0 ? 0 : tokens.length - 1) : place + way];
    if (!next) return;
    event.preventDefault();
    next.scrollIntoView({ block: "nearest", behavior: "instant" });
    requestAnimationFrame(() => requestAnimationFrame(() => pin(next))); // after the scrolling, which hides it
  });
  document.addEventListener("scroll", hide, { capture: true, passive: true });
})();
