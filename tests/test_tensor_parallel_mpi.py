"""Ranks in processes of their own, started by ``mpirun``: the same tokens, and one end for all when one fails."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tensor_parallel import LIGHT, mpirun, needs_mpirun
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fuseline
from fuseline.runtime import cli
from fuseline.runtime.mpi import watchdog
from fuseline.runtime.sequence import SamplingParams

pytestmark = needs_mpirun


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


_SERVING = """
import os, signal, sys, time
import fuseline
import transformers
from fuseline.runtime import cli
from fuseline.runtime.ranks import rank_of

model, out = sys.argv[1:]
rank, command = rank_of(), ["run", model, "hello", "--max-new-tokens", "12", "--device", "cpu", "--tensor-parallel", "2"]
cli.app(command, standalone_mode=False)
compiled = fuseline.compile(model, device="cpu", max_seq_len=64, tensor_parallel=2)
with open(f"{out}/drawn{rank}", "w") as file:
    file.write(repr(compiled.generate([[5, 6, 7], [9]], max_new_tokens=12, temperature=5.0)))
transformers.AutoModelForCausalLM.from_pretrained = None
parts = fuseline.compile("some/model", device="cpu", max_seq_len=64, tensor_parallel=2)
with open(f"{out}/parts{rank}", "w") as file:
    tokens = parts.generate([[5, 6, 7], [9]], max_new_tokens=12, stop_token_ids=[])
    file.write(repr((tokens, parts.report.source_check)))
for number in range(4):  # every other one is drawn
    kinds = [dict(top_k=9), dict(top_p=0.9)][number // 2]
    params = fuseline.runtime.sequence.SamplingParams(9, 2.0 * (number % 2), seed=number, **kinds)
    parts.engine.add([3, 1, 4][: 1 + number % 3], params)
with open(f"{out}/mixed{rank}", "w") as file:
    file.write(repr([item.output for _, item in sorted(parts.engine.run().items())]))
made = []

def made_one(event):
    made.append(event)
    if len(made) == 5 and rank == 1:
        with open(f"{out}/stopped", "w") as file:
            file.write(str(time.time()))
        os.kill(os.getpid(), signal.SIGSTOP)

for prompt in ([5, 6, 7], [9]):
    compiled.engine.add(prompt, fuseline.runtime.sequence.SamplingParams(20))
try:
    compiled.engine.run(made_one)
except fuseline.RankError as error:
    with open(f"{out}/raised{rank}", "w") as file:
        file.write(f"{len(made)} tokens, then {error}")
    raise
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``some/model``, whose weights are in several files, in a local cache of the hub."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "head_dim": 8,
        "initializer_range": 0.2,
    }
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 128}
    hub = tmp_path_factory.mktemp("hub")
    cache = hub / "models--some--model"
    snapshot = cache / "snapshots" / ("0" * 40)
    made = LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes, **heads)).eval()
    made.save_pretrained(snapshot, max_shard_size="99KB")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    return hub


def test_ranks_serve_like_one_process_until_one_is_stopped(
    tiny: str, published: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One start of two processes for what they print, what they draw, what they read, and what requests in flight get when
    one stops."""
    cli.app(["run", tiny, "hello", "--max-new-tokens", "12", "--device", "cpu"], standalone_mode=False)
    alone = capfd.readouterr()
    monkeypatch.setenv("FUSELINE_WATCHDOG", "2.5")
    monkeypatch.setenv("HF_HUB_CACHE", str(published))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = tmp_path / "serving.py"
    script.write_text(_SERVING)
    done = mpirun(2, "-m", "mpi4py", str(script), tiny, str(tmp_path))
    ended = time.time()
    assert done.stdout == alone.out and len(alone.out) > 5, done.stderr
    assert done.stderr.count("tokens/s") == alone.err.count("tokens/s"), "one rank speaks for all"
    # Without a seed each process draws numbers of its own: if the first rank's choice did not count, caches would part.
    assert (tmp_path / "drawn0").read_text() == (tmp_path / "drawn1").read_text()
    # What loads a whole model was taken away: ranks read their parts, and the layers that are traced are compared.
    (snapshot,) = published.glob("*/snapshots/*")
    whole = fuseline.compile(snapshot, device="cpu", max_seq_len=64)
    tokens = whole.generate([[5, 6, 7], [9]], max_new_tokens=12, stop_token_ids=[])
    said = "compared with 3 of its 6 layers: of the others a rank reads its part alone"
    assert [(tmp_path / f"parts{rank}").read_text() for rank in range(2)] == [repr((tokens, said))] * 2
    for number in range(4):
        kinds = [{"top_k": 9}, {"top_p": 0.9}][number // 2]
        whole.engine.add([3, 1, 4][: 1 + number % 3], SamplingParams(9, 2.0 * (number % 2), seed=number, **kinds))
    mixed = repr([item.output for _, item in sorted(whole.engine.run().items())])
    assert [(tmp_path / f"mixed{rank}").read_text() for rank in range(2)] == [mixed] * 2
    said = "rank 0 of 2 has waited 2.5 s for rank 1"
    found = (tmp_path / "raised0").read_text()
    assert said in found and int(found.split()[0]) >= 5, "what runs the requests gets the error"
    assert done.returncode != 0 and said in done.stderr
    assert "ended without a word" not in done.stderr, "a rank that is ended with the job is no news"
    assert ended - float((tmp_path / "stopped").read_text()) < 2.5 + 10


_MEETING = f"""{LIGHT}
import os, signal, sys, time
import torch
from fuseline.runtime.mpi import OptionError, one_job, world

size, out = int(sys.argv[1]), sys.argv[2]
with one_job(size):
    try:
        world(size + 2)
    except OptionError as error:
        print(error)
    group = world(size)
    x = torch.arange(3.0) + group.rank
    parts = group.all_gather(x)
    assert all(torch.equal(part, torch.arange(3.0) + rank) for rank, part in enumerate(parts))
    assert torch.equal(group.all_reduce(x.bfloat16()), sum(parts).bfloat16())
    assert group.all_gather(torch.empty(0, 4))[0].shape == (0, 4)
    if group.rank == 1:
        with open(f"{{out}}/ended", "w") as file:
            file.write(str(time.time()))
        if size == 2:
            raise ValueError("out of luck")
        os.kill(os.getpid(), signal.SIGKILL)
    group.all_reduce(x)
"""


@pytest.mark.parametrize(
    ("count", "said"),
    [(2, "fuseline: rank 1 of 2: ValueError('out of luck')"), (4, "fuseline: rank 1 of 4 has ended without a word")],
    ids=["raises", "is killed"],
)
def test_a_rank_that_fails_ends_the_job_and_is_named(tmp_path: Path, count: int, said: str) -> None:
    """The others would wait for it for ever. Nobody else is to blame: the launcher kills them for it."""
    done = mpirun(count, "-c", _MEETING, str(count), str(tmp_path))
    ended = time.time()
    assert ended - float((tmp_path / "ended").read_text()) < 10, done.stderr
    assert done.returncode != 0
    assert [line[: len(said)] for line in done.stderr.splitlines() if "fuseline: rank" in line] == [said]
    refused = f"tensor_parallel={count + 2} needs as many processes, and mpirun started {count}"
    assert done.stdout.count(refused) == count


def test_without_a_launcher_the_other_ranks_are_started(tiny: str, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["run", tiny, "hello", "--max-new-tokens", "12", "--device", "cpu"]
    cli.app(command, standalone_mode=False)
    alone = capfd.readouterr().out
    cli.app([*command, "--tensor-parallel", "2"], standalone_mode=False)
    assert capfd.readouterr().out == alone


def test_the_watchdog_is_a_number_of_seconds() -> None:
    assert watchdog({}) == 120 and watchdog({"FUSELINE_WATCHDOG": "0.5"}) == 0.5
    for wrong in ("soon", "0", "-3", "inf", "nan"):
        with pytest.raises(fuseline.OptionError, match=f"FUSELINE_WATCHDOG={wrong} is no number of seconds"):
            watchdog({"FUSELINE_WATCHDOG": wrong})
