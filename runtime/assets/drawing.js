
const HEAD = 24, ROW = 17;

/** The drawing of a part; positions were found when the page was made. */
function drawing(plan) {
  const picture = svg("svg", {
    class: "drawing", viewBox: `-8 -8 ${plan.width + 16} ${plan.height + 16}`, width: plan.width + 16, height: plan.height + 16,
    role: "img", "aria-label": "The kernels of this part and the values between them",
  });
  picture.style.minWidth = `${0.78 * plan.width}px`; // smaller than this, the names cannot be read
  picture.append(svg("defs", {}, svg("marker", { id: "tip", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 8, markerHeight: 8, markerUnits: "userSpaceOnUse", orient: "auto" },
    svg("path", { d: "M0 0L8 4L0 8z" }))));
  for (const edge of plan.edges) {
    const line = svg("path", { d: edge.path, class: "edge", "marker-end": "url(#tip)" }, svg("title", {}, edge.values.join(", ")));
    line.dataset.values = edge.values.join(" ");
    picture.append(line);
  }
  for (const box of plan.boxes) picture.append(drawnBox(box));
  picture.addEventListener("mouseover", (event) => light(picture, event.target.closest("[data-value]")?.dataset.value));
  picture.addEventListener("mouseleave", () => light(picture, null));
  return picture;
}

function drawnBox(box) {
  const [width, height] = box.size;
  const group = svg("g", { class: `box ${box.kind}`, transform: `translate(${box.x} ${box.y})` });
  group.append(svg("rect", { class: "frame", width, height, rx: box.kind === "kernel" ? 6 : 11 }));
  const head = box.kernel ? HEAD : 3;
  if (box.kernel) {
    const calls = KERNELS.get(box.kernel)?.calls;
    const label = svg("text", { x: 10, y: 16, class: "title" }, box.kernel);
    group.append(svg("a", { href: address({ open: `kernel:${box.kernel}` }) }, label));
    if (calls) group.append(svg("text", { x: width - 10, y: 16, class: "calls" }, `\u00d7${calls}`));
  }
  for (const [from, to] of box.arcs) {
    const [y0, y1] = [from, to].map((row) => head + row * ROW + ROW / 2 + 1);
    const reach = Math.min(4 + 3 * (to - from), 16);
    group.append(svg("path", { class: "arc", d: `M22 ${y0}C${22 - reach} ${y0} ${22 - reach} ${y1} 22 ${y1}` }));
  }
  box.rows.forEach(([name, label, op, type], row) => {
    const y = head + row * ROW;
    const known = resolve(name);
    const texts = [label, op, type].map((text, at) => svg("text", { x: box.columns[at], y: y + 12.5, class: ["name", "op", "type"][at] }, text));
    const line = svg(known ? "a" : "g", { class: "row", href: known && address({ open: `value:${known}` }) },
      svg("rect", { x: 3, y, width: width - 6, height: ROW, rx: 4 }), texts);
    line.dataset.value = known ?? name;
    line.dataset.name = name;
    group.append(line);
  });
  return group;
}

/** Show where a value goes: its edges, and nothing else, stand out. */
function light(picture, name) {
  for (const edge of picture.querySelectorAll(".edge")) {
    edge.classList.toggle("lit", Boolean(name) && edge.dataset.values.split(" ").some((value) => (resolve(value) ?? value) === name));
  }
}
