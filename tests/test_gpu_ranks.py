"""Ranks on several GPUs, started by ``torchrun`` and ``mpirun``: the tokens of one GPU, as plain steps and as CUDA graphs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make

from fuseline.codegen.exchange import Exchange, MirrorExchange, Places
from fuseline.codegen.launch import load_launches
from fuseline.ir.dist import ALONE
from fuseline.ir.skeleton import skeleton
from fuseline.runtime.caches import new_caches
from fuseline.runtime.executor import Executor
from fuseline.runtime.groups import simulated
from fuseline.runtime.lower import Wishes, lower
from fuseline.runtime.options import KVCacheConfig, resolve
from fuseline.runtime.parts import place_parts, places_of
from fuseline.runtime.report import Report
from fuseline.runtime.selfcheck import step_of
from fuseline.runtime.vocabulary import DividedVocabulary, Vocabulary, vocabulary_of

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
_HERE = Path(__file__).parent

_RANK = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from families import make
import fuseline
from fuseline.runtime.ranks import rank_of

found = {}
for family in sys.argv[2].split(","):
    model = make(family)
    generator = torch.Generator().manual_seed(3)
    vocab = model.config.get_text_config().vocab_size
    prompts = [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in (1, 9, 33, 70, 5)]
    def tokens(**options):
        compiled = fuseline.compile(
            model, device="cuda", dtype=torch.float32, max_batch_size=8, max_seq_len=128, tuning=False, **options
        )
        answers = compiled.generate(prompts, max_new_tokens=12, stop_token_ids=[])
        drawn = compiled.generate(prompts, max_new_tokens=12, temperature=0.7, seed=5, stop_token_ids=[])
        compiled.close()
        return answers, drawn, compiled.report.graphs, compiled.report.meetings
    alone = tokens()
    plain = tokens(tensor_parallel=2, graphs=False)
    recorded = tokens(tensor_parallel=2)
    found[family] = [alone[:2] == plain[:2], alone[:2] == recorded[:2], *recorded[2:]]
if not rank_of():
    print(json.dumps(found), flush=True)
"""


def _started(command: list[str], tmp_path: Path, families: str) -> dict[str, list[object]]:
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    path = os.pathsep.join([str(_HERE.parent / ".src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "NVIDIA_TF32_OVERRIDE": "0"}
    command = [*command, str(script), str(_HERE), families]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@two_gpus
def test_torchrun_starts_ranks_that_give_the_tokens_of_one_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    for family, (plain, recorded, graphs, _) in _started(command, tmp_path, "llama,qwen3,gpt2,mixtral").items():
        assert plain, family
        assert recorded, family
        assert str(graphs).startswith("decode in"), f"{family}: {graphs}"


@two_gpus
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")
def test_mpirun_starts_ranks_that_give_the_tokens_of_one_gpu(tmp_path: Path) -> None:
    root = ["--allow-run-as-root"] if "Open MPI" in _version() and os.geteuid() == 0 else []
    found = _started(["mpirun", *root, "-n", "2", sys.executable], tmp_path, "llama")
    assert found["llama"][:2] == [True, True]


def _version() -> str:
    return subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout


@two_gpus
def test_ranks_that_compile_starts_give_the_tokens_of_one_gpu(tmp_path: Path) -> None:
    found = _started([sys.executable], tmp_path, "llama")
    assert found["llama"][:2] == [True, True]
    assert str(found["llama"][3]).startswith("up to"), "the ranks of a second model map memory as those of the first"


_GONE = """
import os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as distributed
from families import make
import fuseline
from fuseline.runtime import started

teams = []
start = started.Team.__init__
def keep(self, *arguments):
    start(self, *arguments)
    teams.append(self)
started.Team.__init__ = keep

model = make("llama")
prompts = [[1, 2, 3], [4, 5]]
options = dict(device="cuda", dtype=torch.float32, max_batch_size=8, max_seq_len=128, tuning=False)
alone = fuseline.compile(model, **options).generate(prompts, max_new_tokens=20, stop_token_ids=[])
calls = {
    "generate": lambda ours: ours.generate(prompts, max_new_tokens=100, stop_token_ids=[]),
    "score": lambda ours: ours(prompts).logits.sum().item(),
    "time": lambda ours: ours.decode_step_ms(2, 20, 50),
}
ends = [("generate", signal.SIGKILL), ("score", signal.SIGKILL), ("time", signal.SIGKILL), ("generate", signal.SIGSTOP)]
for name, end in ends:
    os.environ.pop("FUSELINE_WATCHDOG", None)
    ours = fuseline.compile(model, tensor_parallel=2, **options)
    assert ours.report.meetings.startswith(sys.argv[2]), ours.report.meetings
    assert ours.generate(prompts, max_new_tokens=20, stop_token_ids=[]) == alone, name
    ((_, process, _),) = teams[-1]._processes
    os.environ["FUSELINE_WATCHDOG"] = "5"
    at = []
    def strike():
        at.append(time.monotonic())
        os.kill(process.pid, end)
    threading.Timer(0.5, strike).start()
    try:
        while not at or time.monotonic() < at[0] + 30:
            calls[name](ours)
        raise AssertionError(f"{name}: nobody has missed rank 1")
    except fuseline.RankError as error:
        assert "rank 1" in str(error), error
        assert time.monotonic() - at[0] < 10, (name, end, time.monotonic() - at[0])
    ours.close()
    assert not distributed.is_initialized(), name
    torch.cuda.synchronize()
    print(name, end.name, round(time.monotonic() - at[0], 1), flush=True)
assert fuseline.compile(model, **options).generate(prompts, max_new_tokens=20, stop_token_ids=[]) == alone
"""


@two_gpus
@pytest.mark.parametrize("meets", ["up to", "through NCCL"])
def test_a_rank_that_is_gone_leaves_a_process_that_can_begin_anew(meets: str, tmp_path: Path) -> None:
    """Killed in the middle of each call, or stopped: the call ends with an error and nothing on the GPU waits any longer."""
    script = tmp_path / "gone.py"
    script.write_text(_GONE)
    if meets != "up to":
        (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['cuda.bindings'] = None\n")
    path = os.pathsep.join([str(_HERE.parent / ".src"), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "NVIDIA_TF32_OVERRIDE": "0"}
    command = [sys.executable, str(script), str(_HERE), meets]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("family", "ranks", "scheme"),
    [
        *((family, 2, None) for family in ("llama", "qwen3", "gpt2", "mixtral")),
        ("llama", 4, None),
        ("llama", 2, "int8d"),
        ("gpt2", 2, "int8d"),
    ],
)
def test_ranks_on_streams_of_one_gpu_give_the_logits_of_one(
    family: str, ranks: int, scheme: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their kernels run beside each other and meet as those of several GPUs do.

    Where rows are rounded, the last digit decides what lies half-way between two codes, in few of them.
    """
    model = make(family)
    device = torch.device("cuda", 0)

    def own_files(rank: int) -> None:
        # What a kernel file keeps between launches, such as counters, belongs to one rank.
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"rank{rank}"))

    (alone,) = logits_of_ranks(model, device, 1, scheme, own_files)
    wanted = torch.cat(alone)
    for found in logits_of_ranks(model, device, ranks, scheme, own_files):
        errors = (torch.cat(found) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert errors.median() < 1e-4 and errors.max() < (0.1 if scheme else 1e-4)


class Side(Exchange):
    """One rank's exchange, in the memory of the GPU that all share."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("all meets in kernels here")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_that_wait_for_ranks_that_are_gone_are_let_go() -> None:
    device = torch.device("cuda", 0)
    places = Places(2, 1024)
    stores = [torch.zeros(places.words, dtype=torch.int64, device=device) for _ in range(2)]
    exchange = Side(places, stores[0], [store.data_ptr() for store in stores], 0)
    first = simulated(2)[0]
    logits = torch.randn(4, 50, device=device)
    tokens, finite = torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(4, dtype=torch.bool, device=device)
    DividedVocabulary(100, 50, [first], MirrorExchange(places, device)).greedy(logits, tokens, finite)  # compiles
    waits = DividedVocabulary(100, 50, [first], exchange)
    stream, other = torch.cuda.Stream(device), torch.cuda.Stream(device)
    with torch.cuda.stream(other):
        exchange.answer()  # what allocates does so now
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        exchange.begin()
        waits.greedy(logits, tokens, finite)
        exchange.begin()
        waits.greedy(logits, tokens, finite)
    time.sleep(0.2)
    assert not stream.query(), "rank 1 has not come"
    until = time.monotonic() + 10
    with torch.cuda.stream(other):
        while not stream.query() and time.monotonic() < until:
            exchange.answer()
            other.synchronize()
    assert stream.query()


def logits_of_ranks(
    model: Any, device: torch.device, ranks: int, scheme: str | None, own_files: Callable[[int], None]
) -> list[list[torch.Tensor]]:
    """The logits of a few steps, prompts of several lengths and single tokens, as each rank gathers them; the most likely
    tokens, which are chosen first, are those of these logits."""
    bones = skeleton(model, torch.float32)
    options = resolve(bones.model.config.get_text_config(), device, torch.float32, 8, 128, None, KVCacheConfig())
    options = replace(options, tensor_parallel=ranks, quantization={"*": scheme} if scheme else {})
    lowered = lower(bones, options, Wishes(), Report(device="cuda", dtype="float32"))
    loop, groups = lowered.loop, simulated(ranks) if ranks > 1 else [ALONE]
    parts, _ = place_parts(loop, loop, bones.load(), device, {}, groups, lambda items: items)
    places = places_of(loop)
    stores = [torch.zeros(places.words, dtype=torch.int64, device=device) for _ in groups]
    addresses = [store.data_ptr() for store in stores]
    vocab = bones.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(1)
    steps = [
        step_of([torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths], 16, device)
        for lengths in ((1,), (5, 3), (1, 1, 1), (40, 20), (7,))
    ]

    streams = [torch.cuda.Stream(device) for _ in groups]

    def model_of(rank: int, exchange: Exchange | None) -> tuple[Executor, Vocabulary]:
        own_files(rank)
        launches = load_launches(lowered.kernels, None, exchange)
        caches, group = new_caches(loop, 512, device), groups[rank]
        executor = Executor(loop, parts[rank].constants, caches, device, launches, None, group, exchange)
        return executor, vocabulary_of(loop.graph, [group], device, exchange)

    def run(rank: int, made: tuple[Executor, Vocabulary]) -> list[torch.Tensor]:
        torch.cuda.set_device(device)
        model, vocabulary = made
        with torch.cuda.stream(streams[rank]):
            found, chosen = [], []
            for step in steps:
                logits = model(step)
                tokens = torch.full((len(logits),), -5, device=device)
                finite = torch.zeros(len(logits), dtype=torch.bool, device=device)
                vocabulary.greedy(logits, tokens, finite)
                found.append(vocabulary.whole(logits))
                chosen.append((tokens, finite))
            streams[rank].synchronize()
        for logits, (tokens, finite) in zip(found, chosen):
            first = (logits == logits.amax(-1, keepdim=True)).int().cpu().argmax(-1)
            assert torch.equal(tokens.cpu(), first) and bool(finite.all())
        return found

    if ranks == 1:
        return [run(0, model_of(0, None))]
    # One after the other first: what is loaded and allocated waits for kernels that run, and they would wait for others.
    for rank in range(ranks):
        run(rank, model_of(rank, MirrorExchange(places, device)))
    models = [model_of(rank, Side(places, stores[rank], addresses, rank)) for rank in range(ranks)]
    torch.cuda.synchronize()
    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(run, range(ranks), models))
