"""Ranks on several GPUs, started by ``torchrun`` and ``mpirun``: the tokens of one GPU, as plain steps and as CUDA graphs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
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
        return answers, drawn, compiled.report.graphs
    alone = tokens()
    plain = tokens(tensor_parallel=2, graphs=False)
    recorded = tokens(tensor_parallel=2)
    found[family] = [alone[:2] == plain[:2], alone[:2] == recorded[:2], recorded[2]]
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


def test_torchrun_starts_ranks_that_give_the_tokens_of_one_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    for family, (plain, recorded, graphs) in _started(command, tmp_path, "llama,qwen3,gpt2,mixtral").items():
        assert plain, family
        assert recorded, family
        assert str(graphs).startswith("decode in"), f"{family}: {graphs}"


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")
def test_mpirun_starts_ranks_that_give_the_tokens_of_one_gpu(tmp_path: Path) -> None:
    root = ["--allow-run-as-root"] if "Open MPI" in _version() and os.geteuid() == 0 else []
    found = _started(["mpirun", *root, "-n", "2", sys.executable], tmp_path, "llama")
    assert found["llama"][:2] == [True, True]


def _version() -> str:
    return subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout


def test_ranks_that_compile_starts_give_the_tokens_of_one_gpu(tmp_path: Path) -> None:
    found = _started([sys.executable], tmp_path, "llama")
    assert found["llama"][:2] == [True, True]
