
const MOST_HITS = 40;

function searchIndex() {
  const entries = [];
  const add = (kind, name, detail, change) => entries.push({ kind, name, detail, change, text: `${name} ${detail}`.toLowerCase() });
  DATA.passes.forEach((pass, at) => {
    add("pass", pass.name, pass.found ? `${pass.fused} fused, ${pass.refused} refused` : "found nothing", { view: `pass:${at}` });
  });
  for (const [name, kernel] of KERNELS) add("kernel", name, `\u00d7${kernel.calls}`, { open: `kernel:${name}` });
  for (const [name, value] of VALUES) add("value", name, `${value.op ?? "input"} ${value.type} ${value.rules?.join(" ") ?? ""} ${value.source ?? ""}`, { open: `value:${name}` });
  DATA.passes.forEach((pass, at) => {
    for (const item of pass.reasons) add("reason", item.why, `${pass.name}, ${item.site}`, { view: `pass:${at}` });
  });
  return entries;
}

/** Entries that hold every word; those whose name begins with the first word come first. */
function find(index, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const hits = index.filter((entry) => words.every((word) => entry.text.includes(word)));
  const twin = VALUES.has(query.trim()) ? null : resolve(query.trim());
  if (twin) hits.push({ ...index.find((entry) => entry.kind === "value" && entry.name === twin), detail: `stands for ${query.trim()}` });
  const rank = (entry) => (entry.name.toLowerCase() === words[0] ? 0 : entry.name.toLowerCase().startsWith(words[0]) ? 1 : 2);
  return hits.sort((a, b) => rank(a) - rank(b));
}

function setUpSearch() {
  const box = document.querySelector("#search input"), list = document.getElementById("hits");
  const index = searchIndex();
  let chosen = 0;
  const choose = (at) => {
    const items = list.querySelectorAll("li:not(.more)");
    chosen = Math.max(0, Math.min(at, items.length - 1));
    items.forEach((item, place) => item.classList.toggle("chosen", place === chosen));
    items[chosen]?.scrollIntoView({ block: "nearest" });
  };
  const show = () => {
    const hits = find(index, box.value);
    list.replaceChildren(...hits.slice(0, MOST_HITS).map((hit) => el("li", {}, link(hit.change, {}, el("span", { class: `kind ${hit.kind}` }, hit.kind), el("b", {}, hit.name), el("span", { class: "detail" }, hit.detail)))));
    if (box.value.trim() && !hits.length) list.append(el("li", { class: "more" }, "Nothing found"));
    if (hits.length > MOST_HITS) list.append(el("li", { class: "more" }, `${hits.length - MOST_HITS} more: add a word`));
    list.hidden = !box.value.trim();
    choose(0);
  };
  box.addEventListener("input", show);
  box.addEventListener("focus", show);
  box.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") choose(chosen + 1);
    else if (event.key === "ArrowUp") choose(chosen - 1);
    else if (event.key === "Enter") list.querySelector(".chosen a")?.click();
    else if (event.key === "Escape") { box.blur(); list.hidden = true; event.stopPropagation(); }
    else return;
    event.preventDefault();
  });
  list.addEventListener("click", () => { list.hidden = true; box.blur(); });
  document.addEventListener("mousedown", (event) => { if (!event.target.closest("#search")) list.hidden = true; });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && state().open) go({ open: "" });
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target === box) return;
    event.preventDefault();
    box.focus();
    box.select();
  });
}
