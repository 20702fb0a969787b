
let drawn = { view: null, open: null };

/** The part that a reader most likely wants: the one that stands for most layers. */
function firstLayer() {
  const most = Math.max(...GRAPH.parts.map((part) => part.layers.length));
  return GRAPH.parts.findIndex((part) => part.layers.length === most);
}

/** Bring the page to what the address says, and redraw only what differs. */
function render() {
  const { open, ...given } = state();
  const [kind, number] = given.view.split(":");
  const value = open.startsWith("value:") ? open.slice(6) : null;
  const known = kind === "pass" ? DATA.passes[number] : GRAPH.parts[number];
  let view = known ? given.view : drawn.view ?? `part:${firstLayer()}`;
  // A value that is opened over the graph brings its own part into view.
  const home = VALUES.get(value)?.part;
  if (home !== undefined && view.startsWith("part:") && open !== drawn.open && view !== `part:${home}`) {
    view = `part:${home}`;
    history.replaceState(null, "", address({ view, open }));
  }
  if (view !== drawn.view) {
    const [shown, at] = view.split(":");
    const main = document.querySelector("main");
    main.replaceChildren(...(shown === "pass" ? passView(Number(at)) : graphView(Number(at))).flat(Infinity).filter(Boolean));
    main.scrollTop = 0;
    for (const step of document.querySelectorAll("nav .step")) {
      const here = shown === "pass" ? step.dataset.pass === at : step.classList.contains("graph");
      step.toggleAttribute("aria-current", here);
    }
  }
  if (open !== drawn.open) {
    const aside = document.querySelector("aside");
    const made = open ? panel(open) : null;
    aside.replaceChildren(...(made ?? []).flat(Infinity).filter(Boolean));
    aside.hidden = !made;
    aside.scrollTop = 0;
  }
  select(value);
  if (value && (view !== drawn.view || open !== drawn.open)) {
    for (const place of document.querySelectorAll("main .selected")) if (place.matches(".row")) place.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  drawn = { view, open };
}

document.title = `${DATA.model}, compiled by Fuseline`;
document.querySelector("h1").textContent = DATA.model || "Fuseline";
document.getElementById("summary").textContent = DATA.facts.filter(([name]) => name === "captured" || name === "kernels").map(([name, fact]) => `${name}: ${fact}`).join("  \u00b7  ");
document.querySelector("nav").append(...pipeline().flat(Infinity));
setUpSearch();
window.addEventListener("hashchange", render);
render();
