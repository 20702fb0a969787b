
/** The right of the page: a value, a kernel or a line of model code. */
function panel(open) {
  const [kind, ...rest] = open.split(":");
  const name = rest.join(":");
  const made = { value: valuePanel, kernel: kernelPanel, source: sourcePanel }[kind]?.(name);
  if (!made) return null;
  return [el("a", { href: address({ open: "" }), class: "close", title: "Close (Esc)", "aria-label": "Close" }, "\u2715"), made];
}

function section(title, ...children) {
  return [el("h3", {}, title), ...children];
}

function valuePanel(name) {
  const value = VALUES.get(name);
  if (!value) return null;
  const part = value.part === undefined ? null : GRAPH.parts[value.part];
  const line = part ? part.lines[value.line][0].trim() : `${name}: ${value.type}`;
  const rules = value.rules?.map(passLink) ?? [];
  const origin = rules.length ? ["Made by ", rules.flatMap((rule, at) => (at ? [", ", rule] : [rule]))]
    : part ? "As captured from the model" : "An input of the graph";
  const operands = operandsOf(name);
  return [
    el("h2", {}, name),
    el("p", { class: "type" }, value.type),
    part ? el("p", {}, origin, ". Shown under: ", link({ view: `part:${value.part}` }, {}, part.title), ".") : el("p", {}, origin, "."),
    section("Line", el("div", { class: "code wrap" }, lineOf(line))),
    operands.length ? section("Reads", listOf(operands.map((operand) => [operand, 1]))) : null,
    section(`Read by ${value.users.length}`, value.users.length ? listOf(value.users) : el("p", { class: "note" }, "Nothing but the result of the graph.")),
    value.source ? section("Model code", excerpt(value.source)) : null,
    value.kernel ? section("Kernel", el("p", {}, kernelLink(value.kernel), ` computes it; ${callsOf(value.kernel)}.`), source(value.kernel))
      : part ? section("Kernel", el("p", { class: "note" }, /^(weight|const|cache)$/.test(value.op) ? "None: it is loaded or kept, not computed." : "None: it is a view, or computed once when the model is loaded.")) : null,
  ];
}

function listOf(users) {
  return el("ul", { class: "values" }, users.map(([user, count]) =>
    el("li", {}, valueLink(user), el("span", { class: "op" }, ` ${VALUES.get(resolve(user))?.op ?? ""}`), count > 1 ? el("span", { class: "note" }, ` \u00d7${count}`) : null)));
}

function callsOf(kernel) {
  const calls = KERNELS.get(kernel).calls;
  return calls === 1 ? "launched once in a step" : `launched ${calls} times in a step`;
}

function source(kernel) {
  return el("pre", { class: "code triton" }, python(KERNELS.get(kernel).source));
}

function kernelPanel(name) {
  const kernel = KERNELS.get(name);
  if (!kernel) return null;
  const lines = GRAPH.parts.flatMap((part, at) => {
    const mine = part.lines.filter(([, value]) => value && VALUES.get(value).kernel === name);
    return mine.length ? [el("h4", {}, link({ view: `part:${at}` }, {}, part.title)), el("div", { class: "code wrap" }, mine.map(([text]) => el("div", { class: "line" }, lineOf(text.trim()))))] : [];
  });
  return [el("h2", {}, name), el("p", {}, `A kernel, ${callsOf(name)}.`), section("Computes", lines), section("Triton source", source(name))];
}

function sourcePanel(reference) {
  const [file, line] = reference.split(":");
  if (!SOURCES.get(file)?.lines[line]) return null;
  const here = [...VALUES].filter(([, value]) => value.source === reference).map(([name]) => [name, 1]);
  return [el("h2", {}, reference), excerpt(reference), here.length ? section("Values from this line", listOf(here)) : null];
}

/** A line of model code with its neighbours, or the bare reference where the file was not at hand. */
function excerpt(reference) {
  const [file, line] = reference.split(":");
  const known = SOURCES.get(file);
  if (known?.lines[line] === undefined) return el("p", { class: "note" }, reference);
  const near = Object.entries(known.lines).filter(([number]) => Math.abs(number - line) <= 4);
  const indent = Math.min(...near.map(([, text]) => (text.trim() ? text.search(/\S/) : Infinity)));
  return [
    el("p", { class: "note" }, sourceLink(reference), known.scopes[line] ? `, ${known.scopes[line]}` : ""),
    el("div", { class: "code excerpt" }, near.map(([number, text]) => el("div", { class: number === line ? "line here" : "line" },
      el("span", { class: "number" }, number), python(text.slice(indent === Infinity ? 0 : indent))))),
  ];
}
