"""``fuseline bench``: each workload, the floor, the peers, and what comes out."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from benching import SIZES, call, save_tiny
from quantized_models import wide
from transformers import PreTrainedModel

import fuseline
from fuseline.runtime import cli
from fuseline.runtime.bench import measure, plot, results, run, shapes
from fuseline.runtime.bench.floor import decode_bytes, prefill_operations
from fuseline.runtime.bench.measure import Clock, Reference, measure_batch, measure_stream
from fuseline.runtime.bench.peers import NotMeasured, Peer, Served, Setup
from fuseline.runtime.bench.results import Measurement
from fuseline.runtime.bench.workloads import Batch, Request, Stream

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_every_workload_is_measured_beside_a_peer(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    options = ["--workloads", "decode,prefill,mixed,rates", "--against", "eager,vllm", "--json", str(file), *SIZES]
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert call(monkeypatch, tiny, *options) == 0
    table = capsys.readouterr().out
    found = results.read([file])
    assert [item.to_json() for item in found] == file.read_text().splitlines()
    assert all(results.row(item) in table for item in found)
    by = {(item.who, item.label): item for item in found}
    labels = ["start-up", "decode 1 x 8+6", "decode 3 x 8+6", "prefill 3 x 16", "mixed 6 requests"]
    labels += ["rates 6 requests at 30/s"]
    assert [label for who, label in by if who == "fuseline"] == labels
    for label in labels[1:]:
        ours = by["fuseline", label]
        assert ours.ms and ours.ms > 0 and ours.tokens_per_s and ours.tokens_per_s > 0, label
        assert ours.right and re.fullmatch(r"same (\d)/\1", ours.check), f"{label}: {ours.check}"
        assert ours.machine["copy_GB_s"] == 10 and "fuseline bench" in ours.machine["command"]
    for label in labels[1:4]:
        for who in ("fuseline", "eager"):
            item = by[who, label]
            assert len(item.runs) == 2 and item.share and item.floor_ms
            assert item.share == pytest.approx(item.floor_ms / item.ms)
            assert item.floor_ms == by["fuseline", label].floor_ms, "one floor for all"
    for label in labels[4:]:
        assert 0 < by["fuseline", label].details["ttft_ms"][0] <= by["fuseline", label].details["ttft_ms"][1]
        assert by["fuseline", label].details["steps"] >= 5
        assert by["eager", label].ms is None and "whole batches" in by["eager", label].note
    assert "not installed" in by["vllm", "start-up"].note
    assert not [label for who, label in by if who == "vllm" and label != "start-up"]


class Fake(Peer):
    """Takes a second for a prefill and 0.1 s for each further token, on a clock of its own."""

    name = "fake"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spoil: int = 0) -> None:
        self.now, self.spoil = 0.0, spoil
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        self.now += 1.0 + 0.1 * (new_tokens - 1)
        return [[prompt[0]] * (new_tokens - self.spoil) for prompt in prompts]

    def serve(self, requests: Sequence[Request]) -> list[Served]:
        return [
            Served([0] * one.new_tokens, [one.arrival + 1.0 + 0.1 * place for place in range(one.new_tokens)])
            for one in requests
        ]

    def step_ms(self, batch: int, context: int) -> float | None:
        return 1.0 * batch + context

    def close(self) -> None:
        pass


def test_rounding_is_measured_and_named(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tokens are not compared with the model's; nonsense is refused before anything is measured."""
    file = tmp_path / "results.json"
    options = ["--workloads", "decode", "--quantization", "int8", "--kv-cache", "int8", "--json", str(file), *SIZES]
    assert call(monkeypatch, tiny, *options) == 0
    found = results.read([file])
    assert {item.dtype for item in found} == {"float32, int8, int8 KV"} and not any(item.check for item in found)
    plain = tmp_path / "plain.json"
    assert call(monkeypatch, tiny, "--workloads", "decode", "--json", str(plain), *SIZES) == 0
    floors = [[item.floor_ms or 0.0 for item in results.read([name])][1] for name in (file, plain)]
    assert floors[0] < 0.6 * floors[1]
    for wrong in (["--quantization", "int3"], ["--kv-cache", "int4"]):
        assert call(monkeypatch, tiny, *wrong) != 0
    assert "int3" in capsys.readouterr().err


def test_a_step_is_what_a_run_takes_beyond_its_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    peer, item = Fake(monkeypatch), Measurement("m", "float32", "fake", "decode", "")
    work, clock = Batch("decode", 4, 8, 11), Clock(5, seconds=7.0)
    right = Reference(True, {tuple(prompt): [prompt[0]] * 8 for prompt in work.prompts(50, 0)})
    measure_batch(peer, work, 50, clock, right, item)
    assert item.ms == pytest.approx(100.0) and item.tokens_per_s == pytest.approx(40.0)
    assert len(item.runs) == 3, "each takes 3 s, so that after the third the 7 s are spent"
    assert item.check == "same 4/4" and item.right
    assert item.details["graph_ms"] == 4 + 8 + 5, "of the batch, at the mean context"
    item = Measurement("m", "float32", "fake", "prefill", "")
    measure_batch(peer, Batch("prefill", 4, 8, 1), 50, clock, right, item)
    assert item.ms == pytest.approx(1000.0) and item.tokens_per_s == pytest.approx(32.0)


def test_latency_is_counted_from_the_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    peer, item = Fake(monkeypatch), Measurement("m", "float32", "fake", "rates", "")
    measure_stream(peer, Stream("rates", 40, (2, 9), (2, 6), rate=2.0), 50, Clock(1, 1.0), Reference(True), item)
    assert item.details["ttft_ms"] == pytest.approx([1000.0, 1000.0])
    assert item.details["tpot_ms"] == pytest.approx([100.0, 100.0]) and item.ms == pytest.approx(100.0)


def test_missing_tokens_are_an_error_and_wrong_ones_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    work, item = Batch("decode", 4, 8, 11), Measurement("m", "float32", "fake", "decode", "d")
    with pytest.raises(RuntimeError, match="answer 0 of 4 does not have the tokens"):
        measure_batch(Fake(monkeypatch, spoil=1), work, 50, Clock(1, 1.0), Reference(True), item)
    prompts = work.prompts(50, 0)
    first_wrong = Reference(True, {tuple(prompts[0]): [-1], **{tuple(one): [one[0]] for one in prompts[1:]}})
    measure_batch(Fake(monkeypatch), work, 50, Clock(1, 1.0), first_wrong, item)
    assert (item.check, item.right) == ("same 3/4", False)
    assert "WRONG: same 3/4" in results.row(item)
    # In a rounded type one of four may turn, but not three.
    first_wrong.exact = False
    assert first_wrong.check(prompts, [[one[0]] for one in prompts]) == ("first 3/4, same 3/4", True)
    assert first_wrong.check(prompts, [[prompts[0][0]], [-2], [-2], [-2]])[1] is False


@pytest.mark.parametrize("error", [NotMeasured("no such luck"), RuntimeError("out of luck\nat line 3")])
def test_a_peer_that_fails_gives_lines_and_the_others_go_on(
    tiny: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Broken(Fake):
        def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
            raise error

        def close(self) -> None:
            raise error

    def start(name: str, setup: Setup) -> Peer:
        if name == "absent":
            raise error
        return Broken(monkeypatch) if name == "broken" else Fake(monkeypatch)

    monkeypatch.setattr(run, "start", start)
    source = shapes.Source.of(tiny, torch.device("cpu"), torch.float32)
    told: list[Measurement] = []
    work = [Batch("decode", 1, 8, 4), Stream("mixed", 2, (2, 3), (2, 3))]
    plan = run.Plan(
        Setup(source, 2, 16), work, ["absent", "broken", "last"], Clock(1, 1.0), run.Rates(1, 1), {}, told.append,
        run.Progress(),
    )  # fmt: skip
    assert run.run(plan) == told
    reason = "no such luck" if isinstance(error, NotMeasured) else "RuntimeError: out of luck"
    assert [(item.label, item.note) for item in told[3:]] == [
        ("start-up", reason),
        ("start-up", ""),
        ("decode 1 x 8+4", reason),
        ("mixed 2 requests", ""),
        ("start-up", ""),
        ("decode 1 x 8+4", ""),
        ("mixed 2 requests", ""),
    ]
    assert results.row(told[3]).endswith(f"not measured: {reason}")


def test_wrong_tokens_end_with_an_error(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "start", lambda *_: Fake(monkeypatch))
    monkeypatch.setattr(Fake, "name", "fuseline")
    assert call(monkeypatch, tiny, "--workloads", "decode", *SIZES) == 1


def test_requests_follow_the_seed() -> None:
    work = Stream("rates", 400, (4, 20), (2, 5), rate=8.0)
    made = work.requests(1000, 0)
    assert made == work.requests(1000, 0)
    arrivals = [one.arrival for one in made]
    assert arrivals == sorted(arrivals) and 40 < arrivals[-1] < 62, "400 at 8 a second"
    assert {len(one.prompt) for one in made} == set(range(4, 21)) and {one.new_tokens for one in made} == {2, 3, 4, 5}
    again = work.requests(1000, 1)
    assert [one.arrival for one in again] == arrivals and again[0].prompt != made[0].prompt
    assert [one.arrival for one in Stream("rates", 400, (4, 20), (2, 5), 8.0, seed=1).requests(1000, 0)] != arrivals
    assert {one.arrival for one in Stream("mixed", 9, (4, 20), (2, 5)).requests(1000, 0)} == {0.0}
    assert Batch("decode", 8, 5, 2).prompts(1000, 0)[:3] == Batch("decode", 3, 5, 2).prompts(1000, 0)


def compiled(name: str) -> tuple[PreTrainedModel, Any]:
    model = families.make(name)
    return model, fuseline.compile(model, device="cpu", max_batch_size=2).graph


def test_the_floor_of_a_llama_is_its_weights_and_its_cache() -> None:
    model, graph = compiled("llama")
    config = model.config
    # The scales of norms are in the weights that follow, but for the last.
    weights = sum(item.numel() for item in model.parameters() if item.dim() > 1) + config.hidden_size
    weights -= model.model.embed_tokens.weight.numel()
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    # The frequencies of the rotary embedding are read too.
    expected = 4 * (weights + 5 * config.hidden_size + 5 * 40 * per_token + config.head_dim // 2)
    assert decode_bytes(graph, 5, 40) == expected
    matrices = sum(item.numel() for name, item in model.named_parameters() if "layers" in name and item.dim() == 2)
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * (1 + 2 + 3 + 4)
    assert prefill_operations(graph, 3, 4) == 3 * 2 * (4 * matrices + model.lm_head.weight.numel() + 2 * attention)


def test_the_floor_counts_the_bytes_of_codes() -> None:
    model = wide("llama")
    plain, rounded = (
        fuseline.compile(model, quantization=scheme, device="cpu", max_batch_size=2) for scheme in (None, "int4g32")
    )
    saved = plain.report.weight_bytes - rounded.report.weight_bytes
    assert decode_bytes(plain.graph, 3, 8) - decode_bytes(rounded.graph, 3, 8) == saved > 0


def test_the_floor_counts_only_the_experts_and_the_keys_that_are_read() -> None:
    model, graph = compiled("mixtral")
    one, many = decode_bytes(graph, 1, 1), decode_bytes(graph, 500, 1)
    experts = 4 * sum(item.numel() for name, item in model.named_parameters() if ".experts." in name)
    rows = 4 * model.config.hidden_size * min(499, model.config.vocab_size - 1)
    cache = 4 * 499 * 2 * 2 * model.config.num_key_value_heads * 8
    assert many - one - rows - cache == pytest.approx(experts / 2), "one token goes to two of four"
    _, graph = compiled("gpt_oss")
    growth = [decode_bytes(graph, 1, context + 1) - decode_bytes(graph, 1, context) for context in (3, 50)]
    assert growth[0] == 2 * growth[1] > 0, "one of two layers sees 5 keys at most"


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.2-1b", 1.236),
        ("llama-3.1-8b", 8.030),
        ("llama-2-7b", 6.738),
        ("llama-2-13b", 13.016),
        ("llama-2-70b", 68.977),
        ("qwen3-30b-a3b", 30.532),
    ],
)
def test_shapes_have_the_parameters_of_the_published_models(name: str, billions: float) -> None:
    model = shapes.random_model(shapes.shape_config(name), "meta", torch.bfloat16)
    assert sum(item.numel() for item in model.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_random_weights_keep_activations_sane_over_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 40}
    monkeypatch.setitem(shapes.SHAPES, "small", {**small, "num_attention_heads": 4})
    source = shapes.Source.of("shape:small", torch.device("cpu"), torch.bfloat16)
    model = source.model()
    assert model is source.model() and model.dtype == torch.bfloat16
    with torch.no_grad():
        out = model(torch.arange(24)[None], output_hidden_states=True)
    assert 0.3 < float(out.logits.float().std()) < 3 and float(out.hidden_states[-2].abs().max()) < 100
    source.release()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), source.model().parameters())), "seeded"


def test_a_plot_is_drawn_from_result_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, picture = tmp_path / "results.json", tmp_path / "out.png"
    items = [
        Measurement("shape:a", "bfloat16", who, "decode", "", batch, 1.0, 1.0, share, machine={"device": "a GPU"})
        for who, share in (("eager", 0.1), ("fuseline", 0.8), ("somebody", None))
        for batch in (1, 8, 64)
    ]
    file.write_text("".join(item.to_json() + "\n" for item in items))
    lines = plot._panels(results.read([file]))["a", "bfloat16", "a GPU"]
    assert list(lines) == ["fuseline", "eager"] and lines["fuseline"] == {1: 80.0, 8: 80.0, 64: 80.0}
    assert call(monkeypatch, "--plot", str(picture), str(file)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(fuseline.OptionError, match=re.escape("pip install 'fuseline[bench]'")):
        plot.draw(items, picture)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shape:llama-9"], "no such shape; use one of shape:llama-2-13b, shape:llama-2-70b, shape:llama-2-7b"),
        (["TINY-gone/"], "there is no such directory"),
        (["TINY/bert"], "not a causal language model that transformers can read"),
        (["TINY", "--against", "eager,tgi"], "--against tgi: there is no such peer"),
        (["TINY", "--workloads", "decode,train"], "--workloads train: there is no such workload"),
        (["TINY", "--workloads", ""], "names nothing to measure"),
        (["TINY", "--batches", "1,0"], "--batches 0: give whole numbers"),
        (["TINY", "--new", "1"], "--new 1: a decode step takes at least 2"),
        (["TINY", "--prefill", "64"], "--prefill 64: give two whole numbers of at least 1, like 64x128"),
        (["TINY", "--workloads", "mixed", "--prompts", "9-4"], "--prompts 9-4: the least comes first"),
        (["TINY", "--workloads", "rates", "--rates", "fast"], "--rates fast: give numbers above 0"),
        (["TINY", "--json", "TINY"], "name a file that can be written"),
        (["TINY", "--memory", "85"], "--memory is a share"),
        (["TINY"], "takes 128 tokens, prompt and answer; the work has up to 384"),
        (["--plot", "out.png", "no-such.json"], "no-such.json: cannot be read"),
        (["--plot", "out.png", "TINY/config.json"], "config.json:1 is no measurement"),
        (["--plot", "out.pdf", "EMPTY"], "must end with .png"),
        (["--plot", "out.png", "EMPTY"], "nothing to draw"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "empty.json").touch()
    given = [item.replace("TINY", tiny).replace("EMPTY", str(tmp_path / "empty.json")) for item in arguments]
    assert call(monkeypatch, *given) == 1
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_the_readme_names_what_there_is() -> None:
    section = (ROOT / "README.md").read_text().split("## Benchmarks")[1].split("\n## ")[0]
    named = set(re.findall(r"shape:([\w.-]+)", section))
    assert named == set(shapes.SHAPES)
    options = set(re.findall(r"--[a-z][a-z-]*", section)) - {"--help"}
    source = (ROOT / "runtime" / "bench" / "command.py").read_text()
    assert {"--against", "--workloads", "--json", "--plot"} <= options
    assert not [option for option in options if f"\n    {option[2:].replace('-', '_')}: " not in source]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_shape_is_measured_on_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = {**shapes.SHAPES["llama-3.2-1b"], "num_hidden_layers": 2}
    monkeypatch.setitem(shapes.SHAPES, "small", small)
    file = tmp_path / "results.json"
    arguments = [
        "bench",
        "shape:small",
        "--workloads",
        "decode,prefill,mixed",
        "--against",
        "eager",
        "--batches",
        "1,8",
    ]
    monkeypatch.setattr(sys, "argv", ["fuseline", *arguments, "--new", "16", "--requests", "32", "--json", str(file)])
    cli.main()
    found = [item for item in results.read([file]) if item.who == "fuseline"]
    assert [item.workload for item in found] == ["start-up", "decode", "decode", "prefill", "mixed"]
    assert all(item.ms and item.right for item in found)
    assert all(0 < item.share < 1.2 for item in found[1:4] if item.share is not None)
