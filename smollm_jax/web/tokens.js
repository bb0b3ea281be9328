// The tooltip of a token: one element, filled with text only, next to the token that the pointer hovers over, that was
// clicked last, or that the arrow keys selected.
(() => {
  const tip = document.createElement("div");
  tip.id = "token-tip";
  tip.setAttribute("role", "status"); // screen readers announce it as the arrow keys move
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
    const data = JSON.parse(token.dataset.about);
    const head = document.createElement("div");
    head.className = "head";
    head.textContent = "probabilities at this position";
    const rows = data.others.map(([text, share]) => row(text, share, text === data.text));
    if (!data.others.some(([text]) => text === data.text)) rows.push(row(data.text, data.p, true));
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
    const direction = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!direction || !event.target.matches("#answer, .card")) return;
    const tokens = [...event.target.querySelectorAll(".token[data-about]")];
    const place = tokens.indexOf(pinned);
    const next = tokens[place < 0 ? (direction > 0 ? 0 : tokens.length - 1) : place + direction];
    if (!next) return;
    event.preventDefault();
    next.scrollIntoView({ block: "nearest", behavior: "instant" });
    requestAnimationFrame(() => requestAnimationFrame(() => pin(next))); // after the scrolling, which hides the tooltip
  });
  document.addEventListener("scroll", hide, { capture: true, passive: true });
})();
