"""The page of a dump: equal layers are one, its links lead somewhere, what it shows is inert, and it works in a browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, config
from transformers import AutoModelForCausalLM

from fuseline import ir, passes
from fuseline.codegen.kernels import emit_kernels
from fuseline.ir.capture import capture
from fuseline.ir.skeleton import skeleton
from fuseline.ir.unfold import unfold
from fuseline.runtime.drawing import layout
from fuseline.runtime.excerpts import Excerpts
from fuseline.runtime.folding import fold, spans_text, split
from fuseline.runtime.page import Page, page_of
from fuseline.runtime.page_passes import side_by_side
from fuseline.runtime.report import Report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# No sandbox for root; the rest keeps the browser from asking the network for anything of its own.
SWITCHES = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!-- {{script}}"
)


@cache
def data_of(family: str, layers: int) -> dict[str, Any]:
    """What the page of a tiny model shows, as plain data; its weights are never computed with."""
    settings = config(FAMILIES[family])
    settings.num_hidden_layers = layers
    if kinds := getattr(settings, "layer_types", None):
        settings.layer_types = [kinds[at % 2] for at in range(layers)]
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    graph = capture(skeleton(model, torch.float32, False), {"kv_block": 16}, 64)
    page, report = Page(), Report("cpu", "float32", type(model).__name__)
    report.capture(graph)
    page.add(graph)
    for step in passes.steps(graph):
        graph = step.graph
        report.passes.append(step.report)
        page.add(graph)
    kernels = emit_kernels(graph)
    report.kernels(unfold(graph), kernels)
    return json.loads(json.dumps(page.data(kernels, report)))


def titles(data: dict[str, Any]) -> list[str]:
    return [part["title"] for part in data["graph"]["parts"]]


def test_equal_layers_are_shown_once() -> None:
    data = data_of("llama", 4)
    assert titles(data) == ["before the layers", "layer 0", "layers 1-3 (3 equal)", "after the layers"]
    for entry in data["passes"]:
        assert len(entry["diff"]) <= 4, f"{entry['name']} shows equal changes more than once"
        assert bool(entry["diff"]) == bool(entry["fused"])


def test_layers_of_two_kinds_in_turn_are_shown_once_each() -> None:
    data = data_of("gemma3_text", 10)
    assert titles(data)[2:4] == ["layers 1, 3, …, 7 (4 equal)", "layers 2, 4, …, 8 (4 equal)"]
    assert len(data["graph"]["parts"]) == 6
    assert all(len(entry["diff"]) <= 6 for entry in data["passes"])


def test_the_page_does_not_grow_with_depth() -> None:
    shallow, deep = data_of("llama", 4), data_of("llama", 80)
    assert titles(deep)[2] == "layers 1-79 (79 equal)"
    assert next(kernel["calls"] for name, kernel in deep["kernels"].items() if name == "qkv") == 80
    assert len(page_of(deep)) < 1.02 * len(page_of(shallow)) < 400_000


@pytest.mark.parametrize(("family", "layers"), [("llama", 4), ("gemma3_text", 10), ("mixtral", 3)])
def test_every_link_leads_somewhere(family: str, layers: int) -> None:
    data = data_of(family, layers)
    graph, kernels = data["graph"], data["kernels"]
    values = graph["values"]
    known = {*values, *graph["aliases"]}
    assert set(graph["aliases"].values()) <= set(values)
    for name, value in values.items():
        assert {user for user, _ in value["users"]} <= set(values)
        assert value.get("kernel") is None or value["kernel"] in kernels
        if "part" in value:
            text, defined, _ = graph["parts"][value["part"]]["lines"][value["line"]]
            assert defined == name and text.strip().startswith(f"{name}: {value['type']} = ")
            call = re.sub(r'"[^"]*"', "", text.partition(" = ")[2].partition("  # ")[0])
            read = set(re.findall(r"\bl\d+_\w+", call))
            assert read <= known, f"{name} reads {read - known}, which stand nowhere"
        if value.get("source"):
            file, line = value["source"].split(":")
            assert data["sources"][file]["lines"][line].strip()
    assert {kernel for part in graph["parts"] for *_, kernel in part["lines"] if kernel} == set(kernels)
    for part in graph["parts"]:
        drawing = part["drawing"]
        assert {row[0] for box in drawing["boxes"] for row in box["rows"]} <= known
        assert {box["kernel"] for box in drawing["boxes"] if box["kind"] == "kernel"} <= set(kernels)
        assert all({*edge["values"]} <= known and edge["from"] < edge["to"] for edge in drawing["edges"])


def test_what_reads_a_value_is_counted_over_all_layers() -> None:
    values = data_of("llama", 80)["graph"]["values"]
    assert ["l1_add_1", 79] in values["mul_1"]["users"]
    assert {"sampled", "l1_mul_1"} <= {user for user, _ in values["l1_add_5"]["users"]}


def test_data_is_inert_and_comes_through_unchanged() -> None:
    data = {**data_of("llama", 4), "model": HOSTILE}
    html = page_of(data)
    assert HOSTILE not in html
    assert html.count("</script>") == 2
    held = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert held and json.loads(held[1]) == data


def test_nothing_is_fetched() -> None:
    html = page_of(data_of("llama", 4))
    assert "default-src 'none'" in html
    assert "unsafe" not in html.partition("</head>")[0].partition("<style>")[0]
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", html)


def test_boxes_of_a_drawing_do_not_touch() -> None:
    sizes = [(100.0, 30.0), (60.0, 20.0), (200.0, 80.0), (90.0, 30.0), (50.0, 20.0), (120.0, 30.0)]
    edges = [(0, 2), (1, 2), (0, 5), (2, 3), (2, 4), (3, 5), (4, 5)]
    drawing = layout(sizes, edges)
    for at, ((x, y), (width, height)) in enumerate(zip(drawing.corners, sizes)):
        assert 0 <= x <= drawing.width - width + 0.1 and 0 <= y <= drawing.height - height
        for (x2, y2), (width2, height2) in list(zip(drawing.corners, sizes))[at + 1 :]:
            assert x + width < x2 or x2 + width2 < x or y + height < y2 or y2 + height2 < y
    tops = [y for _, y in drawing.corners]
    assert all(tops[source] < tops[target] for source, target in edges)
    assert drawing.routes == layout(sizes, edges).routes


def test_a_changed_line_stands_beside_what_it_was() -> None:
    before = ["a: f32[2] = f()", "b: f32[2] = g(a)", "c: f32[2] = h(b)", "d: f32[2] = k(c)"]
    after = ["a: f32[2] = f()", "    c: f32[2] = gh(a)", "    d: f32[2] = k(c)"]
    assert list(side_by_side(before, after)) == [
        [(before[0],), (before[1], None), (before[2], after[1]), (before[3], after[2])]
    ]


def test_a_number_in_a_name_begins_a_layer_only_after_the_attention_of_the_last() -> None:
    lines = ["l0_stem: f32[T, 2, 4] = aten.relu(x)", "l1_stem: f32[T, 2, 4] = aten.relu(l0_stem)"]
    last = "l1_stem"
    for layer in range(3):
        lines += [
            f"l{layer}_part: f32[T, 4] = aten.select.int(l1_stem, 1, {layer})",
            f"l{layer}_attention: f32[T, 2, 4] = nn.attention({last}, {last}, {last}, {layer}, 0.5)",
        ]
        last = f"l{layer}_attention"
    body = "\n    ".join([*lines, f"y: f32[T, 2, 4] = aten.neg({last})", "return y"])
    chunks = split(ir.parse(f"def f(x: f32[T, 2, 4], *, T: dim(1, 64)):\n    {body}\n"))
    assert [(chunk.place, len(chunk.nodes)) for chunk in chunks] == [(0, 4), (1, 2), (2, 2), ("end", 1)]
    assert [item.title for item in fold(chunks)] == ["layer 0", "layers 1-2 (2 equal)", "after the layers"]


def test_a_model_dumped_after_its_compile_has_no_diffs() -> None:
    page, report = Page(), Report("cpu", "float32", passes=[passes.PassReport("FuseSiluMul")])
    page.add(ir.parse("def f(x: f32[T, 8], *, T: dim(1, 64)):\n    y: f32[T, 8] = aten.silu(x)\n    return y\n"))
    data = page.data([], report)
    assert data["passes"][0]["diff"] is None
    assert titles(data) == ["the graph"]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([3], "3"),
        ([1, 2, 3], "1-3"),
        ([1, 3], "1, 3"),
        ([0, 6, 12, 18], "0, 6, …, 18"),
        ([0, 1, 2, 4, 5, 6], "0-2, 4-6"),
        ([item for item in range(48) if item % 6 != 5], "0-4, 6-10, 12-16, 18-22, …, 42-46"),
    ],
)
def test_layer_numbers_in_short(numbers: list[int], text: str) -> None:
    assert spans_text(numbers) == text


def test_model_code_that_is_not_at_hand_is_left_out() -> None:
    excerpts = Excerpts()
    excerpts.add(
        "modeling_llama.py:66; modeling_nowhere.py:3; ../modeling_x/../../etc/passwd:1; modeling_llama.py:999999"
    )
    found = excerpts.data()
    assert list(found) == ["modeling_llama.py"]
    assert sorted(found["modeling_llama.py"]["lines"]) == list(range(62, 71))
    assert found["modeling_llama.py"]["scopes"][66] == "LlamaRMSNorm.forward"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}")
    driver = pytest.importorskip("playwright.sync_api", reason="no playwright: install fuseline[test]")
    with driver.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=SWITCHES)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens pages; fails if one complains on the console, or asks for anything but itself."""
    trouble: list[str] = []
    tab = browser.new_page(viewport={"width": 1280, "height": 860})
    tab.set_default_timeout(10_000)
    tab.on("console", lambda message: trouble.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.on("dialog", lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: request.url.startswith("file:") or trouble.append(request.url))

    def show(data: dict[str, Any]) -> Any:
        (tmp_path / "page.html").write_text(page_of(data), encoding="utf-8")
        tab.goto(f"file://{tmp_path / 'page.html'}")
        return tab

    yield show
    tab.close()
    assert not trouble


def test_a_value_leads_to_its_kernel_and_to_the_model_code(opened: Any) -> None:
    tab = opened(data_of("llama", 80))
    assert tab.title() == "LlamaForCausalLM, compiled by Fuseline"
    assert tab.locator("main .tab[aria-current]").inner_text() == "layers 1-79 (79 equal)"
    tab.locator("main svg a.row[data-name='l1_mul_8']").click()
    panel = tab.locator("aside")
    assert panel.locator("h2").inner_text() == "l1_mul_8"
    assert "@triton.jit" in panel.locator(".triton").inner_text()
    assert "self.act_fn(self.gate_proj(x))" in panel.locator(".excerpt .here").inner_text()
    assert tab.locator("main svg .row.selected").get_attribute("data-name") == "l1_mul_8"
    assert tab.locator("main svg .row.operand").count() == 2
    panel.locator("a.kernel").first.click()
    assert panel.locator("h2").inner_text() == "gate_up"
    assert "launched 80 times" in panel.inner_text()
    # From the kernel's graph lines on to another value, of another part, and back again.
    panel.locator("a.value", has_text="l0_mul_7").first.click()
    assert tab.locator("main .tab[aria-current]").inner_text() == "layer 0"
    tab.go_back()
    tab.wait_for_function("document.querySelector('aside h2').textContent === 'gate_up'")
    tab.keyboard.press("Escape")
    panel.wait_for(state="hidden")


def test_a_value_of_a_hidden_layer_leads_to_the_one_shown(opened: Any) -> None:
    tab = opened(data_of("llama", 80))
    tab.locator(".tab", has_text="after the layers").click()
    tab.locator("main .text a.value", has_text="l79_add_5").click()
    assert tab.locator("aside h2").inner_text() == "l1_add_5"
    assert tab.locator("main .tab[aria-current]").inner_text() == "layers 1-79 (79 equal)"


def test_a_pass_shows_what_it_changed_and_refused(opened: Any) -> None:
    tab = opened(data_of("llama", 4))
    tab.locator("nav .step", has_text="FuseSiluMul").click()
    change = tab.locator("main .change").first
    assert "nn.silu_mul" in change.locator(".side.added").first.inner_text()
    assert "aten.silu" in change.locator(".side.removed").first.inner_text()
    assert tab.locator("main .change").count() == 2
    tab.locator("nav .step", has_text="FuseAddRMSNorm").click()
    assert "the addition is done by the kernel of the projection" in tab.locator("main .reasons").inner_text()


def test_search_finds_values_operators_passes_and_reasons(opened: Any) -> None:
    tab = opened(data_of("llama", 4))
    hits = tab.locator("#hits li")
    for query, first in [
        ("silu_mul", "l0_mul_8"),
        ("qkv", "qkv"),
        ("fuserope", "FuseRope"),
        ("addition is done by", "the addition is done by the kernel"),
        ("l3_mul_8", "l1_mul_8"),
        ("no such thing", "Nothing found"),
    ]:
        tab.keyboard.press("/")
        tab.keyboard.type(query)
        assert first in hits.first.inner_text()
        tab.keyboard.press("Escape")
        tab.locator("main").click(position={"x": 2, "y": 2})
    tab.keyboard.press("/")
    tab.keyboard.type("paged_attention")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    assert tab.locator("aside h2").inner_text() == "l1_attention"


def test_hostile_names_stay_text(opened: Any) -> None:
    data = json.loads(json.dumps(data_of("llama", 4)))
    data["model"] = HOSTILE
    data["kernels"]["rotary_tables"]["source"] = HOSTILE
    for entry in data["passes"]:
        entry["doc"] = HOSTILE
        for item in entry["reasons"]:
            item["why"] = item["site"] = HOSTILE
    for part in data["graph"]["parts"]:
        part["title"] = HOSTILE
        for line in part["lines"]:
            line[0] += HOSTILE
    tab = opened(data)
    tab.locator("nav .step", has_text="rotary_tables").click()
    tab.locator("nav .step", has_text="FuseAddRMSNorm").click()
    assert HOSTILE in tab.locator("main .reasons").inner_text()
    assert tab.title() == f"{HOSTILE}, compiled by Fuseline"
    assert tab.locator("img").count() == 0
    assert tab.locator("script").count() == 2
