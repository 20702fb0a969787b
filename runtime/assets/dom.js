"use strict";
// What the page shows is data of the model: it only ever becomes text nodes and attributes, never markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const GRAPH = DATA.graph;
const VALUES = new Map(Object.entries(GRAPH.values));
const ALIASES = new Map(Object.entries(GRAPH.aliases));
const KERNELS = new Map(Object.entries(DATA.kernels));
const SOURCES = new Map(Object.entries(DATA.sources));
const PASS_AT = new Map();
DATA.passes.forEach((pass, at) => { if (!PASS_AT.has(pass.name) || pass.found) PASS_AT.set(pass.name, at); });

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

/** An element. Strings among the children become text. */
function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

/** Where the page stands: `view` is what the middle shows, `open` what the panel shows. */
function state() {
  const given = new URLSearchParams(location.hash.slice(1));
  return { view: given.get("view") ?? "", open: given.get("open") ?? "" };
}

function address(change) {
  return "#" + new URLSearchParams(change);
}

/** A link that changes a part of the state and leaves the rest. */
function link(change, attributes, ...children) {
  return el("a", { href: address(change), ...attributes }, ...children);
}

function go(change) {
  const next = { ...state(), ...change };
  for (const key of Object.keys(next)) if (!next[key]) delete next[key];
  const target = address(next);
  if (location.hash !== target) location.hash = target;
  render();
}

document.addEventListener("click", (event) => {
  const target = event.target.closest("a[href^='#']");
  if (!target || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go(Object.fromEntries(new URLSearchParams(target.getAttribute("href").slice(1))));
});

/** The value that stands for a name: itself, or its twin in the layer that is shown; null if there is none. */
function resolve(name) {
  if (VALUES.has(name)) return name;
  if (ALIASES.has(name)) return ALIASES.get(name);
  const parts = /^l(\d+)_(.*)$/.exec(name);
  const home = parts && GRAPH.parts.find((part) => part.layers.includes(Number(parts[1])));
  const twin = home && `l${home.layers[0]}_${parts[2]}`;
  return twin && VALUES.has(twin) ? twin : null;
}

function valueLink(name, text = name, attributes = {}) {
  const known = resolve(name);
  if (!known) return text;
  const twin = known === name ? null : `${name} is shown as ${known}`;
  return link({ open: `value:${known}` }, { class: "value", title: twin, "data-value": known, ...attributes }, text);
}

function sourceLink(reference) {
  const [file, line] = reference.split(":");
  const known = SOURCES.get(file)?.lines[line] !== undefined;
  return known ? link({ open: `source:${reference}` }, { class: "source" }, reference) : reference;
}

function passLink(name) {
  return PASS_AT.has(name) ? link({ view: `pass:${PASS_AT.get(name)}` }, { class: "pass" }, name) : name;
}

function kernelLink(name) {
  return KERNELS.has(name) ? link({ open: `kernel:${name}` }, { class: "kernel" }, name) : name;
}

/** A line of graph text with everything in it that can be followed. `hot` is the stretch that changed. */
function lineOf(text, kernel = null, hot = null) {
  const comment = / {2}# [^"]*$/.exec(text);
  const code = comment ? text.slice(0, comment.index) : text;
  const found = [];
  const add = (piece, at, node) => {
    const changed = hot && at < hot[1] && at + piece.length > hot[0];
    found.push(changed ? el("mark", {}, node) : node);
  };
  for (const match of code.matchAll(/"(?:[^"\\]|\\.)*"|[A-Za-z_][\w.]*|[^A-Za-z_"]+|"/g)) {
    const piece = match[0];
    if (kernel && piece.startsWith('"')) add(piece, match.index, kernelLink(kernel));
    else if (piece.startsWith('"')) add(piece, match.index, el("span", { class: "string" }, piece));
    else if (/^(aten|nn)\./.test(piece)) add(piece, match.index, el("span", { class: "op" }, piece));
    else if (/^[A-Za-z_]\w*$/.test(piece)) add(piece, match.index, valueLink(piece));
    else add(piece, match.index, piece);
  }
  if (comment) {
    const notes = comment[0].slice(4).split("; ");
    const linked = notes.map((note) => (/\.py:\d+$/.test(note) ? sourceLink(note) : passLink(note)));
    found.push(el("span", { class: "comment" }, "  # ", linked.flatMap((note, at) => (at ? ["; ", note] : [note]))));
  }
  return found;
}

/** Python with its words told apart. */
function python(text) {
  const words = "and as assert break class continue def elif else False for from if import in is lambda None not or pass return True while with";
  const keywords = new Set(words.split(" "));
  const pattern = /#[^\n]*|"""[\s\S]*?"""|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|@[\w.]+|[A-Za-z_]\w*|\d[\w.]*|[^\w#"'@]+|./g;
  return [...text.matchAll(pattern)].map(([piece]) => {
    if (piece.startsWith("#")) return el("span", { class: "comment" }, piece);
    if (/^["']/.test(piece)) return el("span", { class: "string" }, piece);
    if (piece.startsWith("@") || keywords.has(piece)) return el("span", { class: "word" }, piece);
    return piece;
  });
}
