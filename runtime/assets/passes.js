
/** The left of the page: one row a pass, its bar where it ran in time; then the kernels and the account of the compile. */
function pipeline() {
  const total = DATA.passes.reduce((sum, pass) => sum + pass.milliseconds, 0) || 1;
  let begin = 0;
  const rows = DATA.passes.map((pass, at) => {
    const bar = svg("svg", { class: "bar", viewBox: "0 0 100 1", preserveAspectRatio: "none" },
      svg("rect", { x: Math.min((100 * begin) / total, 99.4), width: Math.max((100 * pass.milliseconds) / total, 0.6), height: 1 }));
    begin += pass.milliseconds;
    const cell = (count, kind) => el("span", { class: `count ${count ? kind : "none"}` }, String(count));
    return link({ view: `pass:${at}` }, { class: pass.found ? "step" : "step idle", "data-pass": at, title: pass.doc },
      el("span", { class: "label" }, pass.name), cell(pass.found, "found"), cell(pass.fused, "fused"), cell(pass.refused, "refused"),
      el("span", { class: "time" }, pass.milliseconds.toFixed(pass.milliseconds < 99.95 ? 1 : 0)), bar);
  });
  const kernels = [...KERNELS].map(([name, kernel]) => link({ open: `kernel:${name}` }, { class: "step two" }, el("span", { class: "label" }, name), el("span", { class: "count" }, `\u00d7${kernel.calls}`)));
  const facts = DATA.facts.map(([name, fact]) => [el("dt", {}, name), el("dd", {}, fact)]);
  return [
    link({ view: `part:${firstLayer()}` }, { class: "step graph" }, el("span", { class: "label" }, "The lowered graph")),
    el("h2", {}, `Pipeline, ${DATA.passes.length} passes, ${total.toFixed(0)} ms`),
    el("div", { class: "step header" }, ["pass", "found", "fused", "refused", "ms"].map((name) => el("span", { class: "count" }, name))),
    rows,
    el("h2", {}, `Kernels, ${KERNELS.size} distinct`), kernels,
    el("h2", {}, "Compile"), el("dl", {}, facts),
  ];
}

/** The middle of the page: what one pass changed, and what it refused. */
function passView(at) {
  const pass = DATA.passes[at];
  const parts = [
    el("div", { class: "title" }, el("h2", {}, pass.name),
      at > 0 ? link({ view: `pass:${at - 1}` }, { class: "tab" }, "\u2190 before") : null,
      at + 1 < DATA.passes.length ? link({ view: `pass:${at + 1}` }, { class: "tab" }, "after \u2192") : null),
    el("p", { class: "doc" }, pass.doc.split("``").map((text, at) => (at % 2 ? el("code", {}, text) : text))),
    el("p", { class: "note" }, `Pass ${at + 1} of ${DATA.passes.length}, ${pass.milliseconds.toFixed(1)} ms: ${pass.found} found, ${pass.fused} fused, ${pass.refused} refused.`),
  ];
  if (pass.reasons.length) {
    parts.push(el("h3", {}, "Refused"), el("table", { class: "reasons" }, el("tbody", {}, pass.reasons.map((item) =>
      el("tr", {}, el("td", {}, lineOf(item.site)), el("td", { class: "count" }, item.count > 1 ? `\u00d7${item.count}` : ""), el("td", {}, lineOf(item.why)))))));
  }
  if (pass.diff === null) parts.push(el("p", { class: "note" }, "The graphs between the passes were not kept: compile with dump= to see what each changed."));
  else if (!pass.diff.length) parts.push(el("p", { class: "note" }, "The graph is the same before and after."));
  else parts.push(el("h3", {}, "Changed"), pass.diff.map(changeOf));
  return parts;
}

function changeOf(change) {
  const rows = change.hunks.flatMap((hunk, at) => [
    at ? el("div", { class: "gap" }, "\u22ef") : null,
    hunk.flatMap(([left, right]) => sidesOf(left, right)),
  ]);
  return el("section", { class: "change" }, el("h4", {}, change.title), el("div", { class: "code diff" }, rows));
}

/** Two cells: before and after. */
function sidesOf(left, right = left) {
  const same = left !== null && right !== null && left.trim() === right.trim();
  const hot = same || left === null || right === null ? [null, null] : changedStretch(left, right);
  return [[left, "left", "removed", hot[0]], [right, "right", "added", hot[1]]].map(([text, side, kind, stretch]) =>
    el("div", { class: `side ${side} ${text === null ? "empty" : same ? "same" : kind}` }, text === null ? "" : lineOf(text, headOf(text), stretch)));
}

function headOf(text) {
  return /^\s*with kernel\("(\w+)"\):$/.exec(text)?.[1] ?? null;
}

/** What is left of each line without their common beginning and end; comments aside, which most often differ. */
function changedStretch(...lines) {
  const [left, right] = lines.map((text) => text.replace(/ {2}# [^"]*$/, ""));
  const shortest = Math.min(left.length, right.length);
  let start = 0, end = 0;
  while (start < shortest && left[start] === right[start]) start += 1;
  while (end < shortest - start && left[left.length - 1 - end] === right[right.length - 1 - end]) end += 1;
  return [[start, left.length - end], [start, right.length - end]];
}
