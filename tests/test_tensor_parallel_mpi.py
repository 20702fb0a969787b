"""Ranks in processes of their own, started by ``mpirun``: the same tokens, and one end for all when one fails."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fuseline

# A mpirun of the environment first, as the wheels of MPICH bring it.
_MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
pytestmark = pytest.mark.skipif(
    _MPIRUN is None or importlib.util.find_spec("mpi4py") is None, reason="needs mpirun and mpi4py"
)
_SOURCE = Path(__file__).parent.parent / ".src"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a tiny random model whose heads, width and vocabulary 4 ranks can divide, and a tokenizer."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [f"<{place}>" for place in range(4)]
    backend.train_from_iterator(
        [], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<0>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, **sizes, **heads)
    path = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def mpirun(count: int, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(_SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}
    command = [str(_MPIRUN), "-n", str(count), sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def script(tmp_path: Path, body: str) -> str:
    file = tmp_path / "ranks.py"
    file.write_text(body)
    return str(file)


@pytest.mark.parametrize("count", [2, 4])
def test_run_prints_what_one_process_prints_once(tiny: str, count: int) -> None:
    arguments = ["-m", "fuseline.runtime.cli", "run", tiny, "hello", "--max-new-tokens", "12", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_SOURCE), os.environ.get("PYTHONPATH", "")])}
    alone = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=280)
    assert alone.returncode == 0, alone.stderr
    together = mpirun(count, *arguments, "--tensor-parallel", str(count))
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone.stdout and len(alone.stdout) > 5
    assert together.stderr.count("tokens/s") == alone.stderr.count("tokens/s"), "one rank speaks for all"


def test_draws_are_those_of_one_rank(tiny: str, tmp_path: Path) -> None:
    """Without a seed each process draws numbers of its own: if the first rank's choice did not count, caches would part."""
    body = f"""
import fuseline
from fuseline.runtime.ranks import rank_of
compiled = fuseline.compile({tiny!r}, device="cpu", max_seq_len=64, tensor_parallel=2)
tokens = compiled.generate([[5, 6, 7], [9]], max_new_tokens=12, temperature=5.0)
open({str(tmp_path)!r} + f"/{{rank_of()}}", "w").write(repr(tokens))
"""
    done = mpirun(2, "-m", "mpi4py", script(tmp_path, body))
    assert done.returncode == 0, done.stderr
    first, second = (Path(tmp_path / str(rank)).read_text() for rank in range(2))
    assert first == second


def test_ranks_read_their_parts_and_no_model(tmp_path: Path) -> None:
    """From a hub id in the local cache. What loads a whole model is taken away; the layers that are traced are compared."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "head_dim": 8,
        "initializer_range": 0.2,
    }
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 128}
    cache = tmp_path / "hub" / "models--some--model"
    snapshot = cache / "snapshots" / ("0" * 40)
    LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes, **heads)).eval().save_pretrained(
        snapshot, max_shard_size="99KB"
    )
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    body = f"""
import fuseline
import transformers
from fuseline.runtime.ranks import rank_of
transformers.AutoModelForCausalLM.from_pretrained = None
compiled = fuseline.compile("some/model", device="cpu", max_seq_len=64, tensor_parallel=2)
tokens = compiled.generate([[5, 6, 7], [9]], max_new_tokens=12, stop_token_ids=[])
open({str(tmp_path)!r} + f"/{{rank_of()}}", "w").write(repr((tokens, compiled.report.source_check)))
"""
    done = mpirun(2, "-m", "mpi4py", script(tmp_path, body), HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    alone = fuseline.compile(snapshot, device="cpu", max_seq_len=64)
    tokens = alone.generate([[5, 6, 7], [9]], max_new_tokens=12, stop_token_ids=[])
    said = "compared with 3 of its 6 layers: of the others a rank reads its part alone"
    assert [Path(tmp_path / str(rank)).read_text() for rank in range(2)] == [repr((tokens, said))] * 2


_FAILING = """
import os, signal, time
import fuseline
from fuseline.runtime.mpi import one_job, world
from fuseline.runtime.ranks import rank_of
import torch
with one_job(2):
    group = world(2)
    group.all_reduce(torch.ones(3))
    {how}
    group.all_reduce(torch.ones(3))
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("if rank_of() == 1: raise ValueError('out of luck')", "fuseline: rank 1 of 2: ValueError('out of luck')"),
        ("if rank_of() == 1: os.kill(os.getpid(), signal.SIGKILL)", ""),
        (
            "group._watchdog = 2.0\n    if rank_of() == 1: time.sleep(100)",
            "rank 0 of 2 has waited 2 s for rank 1",
        ),
    ],
    ids=["raises", "is killed", "stalls"],
)
def test_a_rank_that_fails_ends_the_job(tmp_path: Path, how: str, said: str) -> None:
    begin = time.monotonic()
    imported = subprocess.run([sys.executable, "-c", "import fuseline"], env=_environment(), timeout=60)
    importing = time.monotonic() - begin
    assert imported.returncode == 0
    begin = time.monotonic()
    done = mpirun(2, script(tmp_path, _FAILING.format(how=how)))
    assert done.returncode != 0
    assert said in done.stderr
    assert time.monotonic() - begin < 3 * importing + 10


def _environment() -> dict[str, Any]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(_SOURCE), os.environ.get("PYTHONPATH", "")])}


def test_another_number_of_processes_is_refused(tiny: str) -> None:
    done = mpirun(2, "-m", "fuseline.runtime.cli", "run", tiny, "hello", "--device", "cpu", "--tensor-parallel", "4")
    assert done.returncode != 0
    assert "tensor_parallel=4 needs as many processes, and mpirun started 2" in done.stderr


def test_without_a_launcher_compile_says_how_to_start_ranks(tiny: str) -> None:
    with pytest.raises(fuseline.OptionError, match=r"this process is alone: .*mpirun -n 2 .*simulate=True"):
        fuseline.compile(tiny, device="cpu", tensor_parallel=2)
