
/** The middle of the page: one part of the lowered graph, drawn and as text. */
function graphView(at) {
  const part = GRAPH.parts[at];
  const tabs = GRAPH.parts.map((other, index) => link({ view: `part:${index}` }, { class: "tab", "aria-current": index === at ? "true" : null }, other.title));
  const text = el("div", { class: "code text" });
  if (at === 0) text.append(el("div", { class: "line" }, lineOf(GRAPH.signature)));
  for (const [line, name, kernel] of part.lines) {
    const row = el("div", { class: !name ? "line head" : /^(weight|const|cache)$/.test(VALUES.get(name).op) ? "line quiet" : "line" }, lineOf(line, kernel));
    if (name) row.dataset.value = name;
    text.append(row);
  }
  if (at === GRAPH.parts.length - 1) text.append(el("div", { class: "line" }, lineOf(GRAPH.result)));
  const count = part.lines.filter(([, name]) => name).length;
  return [
    el("div", { class: "tabs" }, tabs),
    el("p", { class: "note" }, "Each frame is a kernel, top to bottom in the order of the data. Click a value, a kernel or a line; weights stand in the text alone."),
    part.drawing ? el("div", { class: "canvas" }, drawing(part.drawing)) : el("p", { class: "note" }, `${count} values: too many to draw, here is the text.`),
    el("h2", {}, "As text"),
    text,
  ];
}

/** Mark a value, what it reads and what reads it, wherever it stands on the page. */
function select(name) {
  for (const old of document.querySelectorAll(".selected, .operand, .user, .edge.on")) {
    old.classList.remove("selected", "operand", "user", "on");
  }
  if (!name || !VALUES.has(name)) return;
  const users = new Set(VALUES.get(name).users.map(([user]) => user));
  const operands = new Set(operandsOf(name));
  for (const row of document.querySelectorAll("main .row, main .line[data-value]")) {
    const value = row.dataset.value;
    if (value === name) row.classList.add("selected");
    else if (operands.has(value)) row.classList.add("operand");
    else if (users.has(value)) row.classList.add("user");
  }
  for (const edge of document.querySelectorAll(".edge")) {
    if (edge.dataset.values.split(" ").some((value) => (resolve(value) ?? value) === name)) edge.classList.add("on");
  }
}

/** The values on the right of a value's line. */
function operandsOf(name) {
  const value = VALUES.get(name);
  if (value.part === undefined) return [];
  const call = GRAPH.parts[value.part].lines[value.line][0].split(" = ").slice(1).join(" = ").replace(/ {2}# [^"]*$/, "").replace(/"(?:[^"\\]|\\.)*"/g, "");
  const names = [...call.matchAll(/[A-Za-z_][\w.]*/g)].map(([word]) => resolve(word)).filter((word) => word && word !== name);
  return [...new Set(names)];
}
