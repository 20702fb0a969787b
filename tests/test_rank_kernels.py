"""Kernels that send to other ranks and kernels that wait for them, several ranks side by side in the interpreter."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from fuseline import passes
from fuseline.codegen.exchange import Exchange, MirrorExchange, Places
from fuseline.codegen.gather import gather_source
from fuseline.codegen.greedy import greedy_source
from fuseline.codegen.kernels import Kernel, emit_kernels, kernel_file
from fuseline.codegen.offline import check_file, compile_variant, load_kernel_file
from fuseline.ir.parse import parse
from fuseline.ir.quantized import quantize, unpack
from fuseline.ir.schemes import scheme_of

SENDER = """\
def down_proj(x: {kind}[T, 48], w: {kind}[{width}, 48], *, T: dim(1, 4096)):
    down: {kind}[T, {width}] = aten.linear(x, w)
    down_sent: {kind}[T, {width}] = dist.send(down, {ranks})
    return [down_sent]
"""
RECEIVER = """\
def all_reduce(x: {kind}[T, {width}], residual: {kind}[T, {width}], *, T: dim(1, 4096)):
    reduced: {kind}[T, {width}] = dist.receive(x, {ranks})
    add: {kind}[T, {width}] = aten.add.Tensor(residual, reduced)
    norm: {kind}[T, {width}] = nn.rms_norm(add, None, 1e-05)
    return [add, norm]
"""
BOTH = RECEIVER.replace("dist.receive", "dist.all_reduce")


class Side(Exchange):
    """One rank's exchange, in the memory of the process that runs all ranks."""

    def __init__(self, places: Places, stores: list[torch.Tensor], rank: int, most: int) -> None:
        super().__init__(places, stores[rank], [store.data_ptr() for store in stores], rank)
        self.most, self.rank = most, rank

    def takes(self, rows: int, width: int, nbytes: int) -> bool:
        return rows <= self.most and super().takes(rows, width, nbytes)  # as many as are sent: none waits for the other

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, 7.0)


def sums(
    sender: str, receiver: str, kind: str, width: int, ranks: int, config: int | None, device: str = "cpu"
) -> list[float]:
    """The worst error of each of a few meetings of different numbers of rows; on the CPU only where Triton interprets."""
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[kind]
    send, receive = load_kernel_file(sender), load_kernel_file(receiver)
    places = Places(ranks, max(128, 1 << (width - 1).bit_length()), 2, 16)
    stores = [torch.zeros(places.words, dtype=torch.int64, device=device) for _ in range(ranks)]
    sides = [Side(places, stores, rank, 8) for rank in range(ranks)]
    generator = torch.Generator().manual_seed(width + ranks)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    weights = [draw(width, 48) for _ in range(ranks)]
    found = []
    for rows in (1, 3, 1, 8, 2, 9, 3):
        if config is not None and rows > 4 and "BLOCK_M" not in send.CONFIGS[config].get("constexprs", {"BLOCK_M": 0}):
            continue  # one row at a time is for a few
        residual, parts = draw(rows, width), [draw(rows, 48) for _ in range(ranks)]
        halves = []
        for side, part, weight in zip(sides, parts, weights):
            half = torch.full((rows, width), torch.nan, dtype=dtype, device=device)
            choices = {} if config is None else {"choices": ((None, config),)}
            send.launch(part, weight, half, ranks=side, **choices)
            halves.append(half)
        whole = sum(part.double() @ weight.double().t() for part, weight in zip(parts, weights))
        if rows > 8:  # through the library, which leaves 7s
            assert all(half.isfinite().all() for half in halves)
            whole = torch.full_like(whole, 7.0)
        wanted = residual.double() + whole
        normed = wanted / (wanted.square().mean(1, keepdim=True) + 1e-5).sqrt()
        results = []
        for side, half in zip(sides, halves):
            add, norm = (torch.full((rows, width), torch.nan, dtype=dtype, device=device) for _ in range(2))
            receive.launch(half, residual, add, norm, ranks=side)
            results.append((add, norm))
        for add, norm in results:
            pairs = ((add, wanted), (norm, normed))
            found.append(max(float((ours.double() - theirs).norm() / theirs.norm()) for ours, theirs in pairs))
            assert torch.equal(add, results[0][0]), "ranks have other bits"
            assert torch.equal(norm, results[0][1]), "ranks have other bits"
    return found


def file(folder: Path, text: str) -> str:
    graph = parse(text)
    path = folder / f"{graph.name}.py"
    path.write_text(kernel_file(graph))
    return str(path)


@pytest.mark.parametrize(("kind", "width", "ranks"), [("f32", 64, 2), ("f32", 72, 3), ("f32", 33, 2), ("bf16", 64, 2)])
def test_ranks_get_the_sum_of_what_all_sent(
    kind: str, width: int, ranks: int, pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    names = {"kind": kind, "width": width, "ranks": ranks}
    sender, receiver = file(tmp_path, SENDER.format(**names)), file(tmp_path, RECEIVER.format(**names))
    # The interpreter does not multiply matrices of bf16: the kernel for one row does without.
    config = None if kind == "f32" else 0
    found = pool.submit(sums, sender, receiver, kind, width, ranks, config).result(timeout=300)
    assert max(found) <= (1e-5 if kind == "f32" else 3e-2)


def test_every_tiling_sends_and_so_does_the_library(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    names = {"kind": "f32", "width": 64, "ranks": 2}
    sender, receiver = file(tmp_path, SENDER.format(**names)), file(tmp_path, RECEIVER.format(**names))
    configs = load_kernel_file(sender).CONFIGS
    kinds: dict[str, int] = {}
    for index, config in enumerate(configs):
        blocks = config.get("constexprs")
        name = "library" if blocks is None else config["kernel"].__name__
        kinds.setdefault(name, index)
    assert {"library", "down_proj_row_kernel", "down_proj_few_kernel", "down_proj_kernel"} <= set(kinds)
    for name, index in kinds.items():
        found = pool.submit(sums, sender, receiver, "f32", 64, 2, index).result(timeout=300)
        assert max(found) <= 1e-5, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("kind", "width", "ranks"), [("f32", 72, 3), ("bf16", 4096, 2), ("bf16", 130, 4)])
def test_ranks_one_after_the_other_on_one_gpu(kind: str, width: int, ranks: int, tmp_path: Path) -> None:
    names = {"kind": kind, "width": width, "ranks": ranks}
    sender, receiver = file(tmp_path, SENDER.format(**names)), file(tmp_path, RECEIVER.format(**names))
    for config in (None, *range(len(load_kernel_file(sender).CONFIGS))):
        found = sums(sender, receiver, kind, width, ranks, config, "cuda")
        assert max(found) <= (1e-5 if kind == "f32" else 3e-2), config


def gathered(path: str, rows: int, width: int, kind: str, ranks: int) -> bool:
    """Whether columns are gathered as they are; the others have what this rank has. Where Triton interprets."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).to(getattr(torch, kind))
    exchange = MirrorExchange(Places(ranks, 256, 2, 16), "cpu")
    same = []
    for scale in (1.0, -2.0, 3.0):
        whole = torch.full((rows, ranks * width), torch.nan, dtype=x.dtype)
        taken = load_kernel_file(path).launch(x * scale, whole, exchange)
        same.append(taken and torch.equal(whole, torch.cat([x * scale] * ranks, 1)))
    return all(same)


@pytest.mark.parametrize(
    ("rows", "width", "kind"),
    [(3, 300, "float32"), (1, 2500, "bfloat16"), (4, 77, "float16"), (5, 1, "float32")],
)
def test_columns_of_all_ranks_are_gathered(
    rows: int, width: int, kind: str, pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    path = tmp_path / "gather.py"
    path.write_text(gather_source(3))
    assert pool.submit(gathered, str(path), rows, width, kind, 3).result(timeout=200)
    assert check_file(path, (90,))


def rows_to_choose_from(vocab: int, kind: str) -> torch.Tensor:
    """Largest logits that are equal in several parts, at either end, and everywhere; the last rows hold no number."""
    logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[1, 0] = logits[2, -1] = 9.0
    logits[3] = -2.0
    logits[4, vocab // 3 :: max(1, vocab // 7)] = 9.0
    logits[5, vocab // 2 :] = 7.0
    logits[6, vocab // 2], logits[7, -1] = torch.nan, torch.inf
    return logits.to(getattr(torch, kind))


def choose(
    path: str, side: Side, parts: list[torch.Tensor], vocab: int, tokens: torch.Tensor, finite: torch.Tensor
) -> None:
    """One rank's choices, of all rows and then of a few: of others, lest it finds words that have come before."""
    launch = load_kernel_file(path).launch
    side.begin()
    for turn, rows in enumerate((8, 3, 8)):
        own = parts[side.rank].roll(turn, 0)[:rows].contiguous()
        assert launch(own, tokens[side.rank, turn, :rows], finite[side.rank, turn, :rows], vocab, side)


def chosen_by_ranks(path: str, vocab: int, width: int, ranks: int, kind: str) -> str:
    """What is wrong with the choices of several ranks at a time, each in a process of its own. Where Triton interprets."""
    logits = rows_to_choose_from(vocab, kind)
    padded = torch.full((8, ranks * width), 1e4, dtype=logits.dtype)  # would win, if it counted
    padded[:, :vocab] = logits
    places = Places(ranks, 128, 2, 16)
    stores = [torch.zeros(places.words, dtype=torch.int64).share_memory_() for _ in range(ranks)]
    tokens = torch.full((ranks, 3, 8), -5).share_memory_()
    finite = torch.zeros(ranks, 3, 8, dtype=torch.bool).share_memory_()
    parts = list(padded.split(width, 1))
    fork = get_context("fork").Process
    running = [
        fork(target=choose, args=(path, Side(places, stores, rank, 8), parts, vocab, tokens, finite))
        for rank in range(ranks)
    ]
    for item in running:
        item.start()
    for item in running:
        item.join(120)
        if item.exitcode != 0:
            item.kill()
            return f"a rank has ended with {item.exitcode}"
    best = (logits.float() == logits.float().amax(1, keepdim=True)).int().argmax(1)
    for rank in range(ranks):
        for turn, rows in enumerate((8, 3, 8)):
            right = torch.tensor([True] * 6 + [False] * 2).roll(turn)[:rows]
            found = tokens[rank, turn, :rows]
            if not torch.equal(finite[rank, turn, :rows], right) or not torch.equal(
                found[right], best.roll(turn)[:rows][right]
            ):
                return f"rank {rank}, turn {turn}: {found} {finite[rank, turn, :rows]}, not {best} {right}"
            if not bool(((found >= 0) & (found < vocab)).all()) or not torch.equal(found, tokens[0, turn, :rows]):
                return f"rank {rank}, turn {turn}: {found}, and the first has {tokens[0, turn]}"
    return ""


@pytest.mark.parametrize(
    ("vocab", "width", "ranks", "kind"),
    [(300, 150, 2, "float32"), (97, 48, 3, "bfloat16"), (5000, 2512, 2, "float16"), (17, 16, 4, "float32")],
)
def test_ranks_choose_the_most_likely_together(
    vocab: int, width: int, ranks: int, kind: str, pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    path = tmp_path / "greedy.py"
    path.write_text(greedy_source(ranks))
    assert pool.submit(chosen_by_ranks, str(path), vocab, width, ranks, kind).result(timeout=300) == ""
    if vocab == 300:
        assert check_file(path, (80, 90))


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_what_is_sent_fits_the_registers_of_gpus(kind: str, tmp_path: Path) -> None:
    names = {"kind": kind, "width": 4096, "ranks": 2}
    for text in (SENDER, RECEIVER, BOTH):
        used = check_file(file(tmp_path, text.format(**names)))
        assert used


GATHERED = """\
def decoder(x: f32[T, 64], *, T: dim(1, 4096), tensor_parallel: option(2)):
    a: f32[64, 64] = weight("a")
    one: f32[T, 64] = aten.linear(x, a)
    wide: f32[T, 128] = dist.all_gather(x, 1, 2)
    b: f32[64, 128] = weight("b")
    other: f32[T, 64] = aten.linear(wide, b)
    one_sum: f32[T, 64] = dist.all_reduce(one, 2)
    second: f32[T, 64] = aten.add.Tensor(other, one_sum)
    return [second]
"""
LAYERS = """\
def decoder(x: f32[T, 64], *, T: dim(1, 4096), tensor_parallel: option(2)):
    a: f32[64, 64] = weight("a")
    b: f32[64, 64] = weight("b")
    one: f32[T, 64] = aten.linear(x, a)
    other: f32[T, 64] = aten.linear(x, b)
    one_sum: f32[T, 64] = dist.all_reduce(one, 2)
    other_sum: f32[T, 64] = dist.all_reduce(other, 2)
    first: f32[T, 64] = aten.add.Tensor({first}, x)
    second: f32[T, 64] = aten.add.Tensor({second}, first)
    return [second]
"""


@pytest.mark.parametrize(
    ("text", "sums"),
    [
        (LAYERS.format(first="one_sum", second="other_sum"), 2),
        (LAYERS.format(first="other_sum", second="one_sum"), 2),
        (GATHERED, 1),
    ],
    ids=["first", "second", "gathered between"],
)
def test_ranks_meet_once_at_a_time(text: str, sums: int) -> None:
    graph = parse(text)
    (step,) = passes.steps(graph, ["GroupKernels"], check=True)
    under_way = 0
    met = 0
    for node in step.graph.calls():
        name = str(node.target)
        under_way += (name == "dist.send") - (name == "dist.receive")
        met += name in ("dist.receive", "dist.all_reduce")
        assert under_way <= 1
        assert not (name in ("dist.all_reduce", "dist.all_gather") and under_way)
    assert met == sums
    kernels: list[Kernel] = emit_kernels(step.graph)
    assert kernels


ROUNDED = """\
def layer(x: f32[T, 96], *, T: dim(1, 64), tensor_parallel: option(2)):
    u: f32[160, 96] = weight("u.weight")
    d: f32[96, 160] = weight("d.weight")
    s: f32[160] = weight("s")
    up: f32[T, 160] = aten.linear(x, u)
    act: f32[T, 160] = aten.relu(up)
    d_smoothed: f32[96, 160] = aten.mul.Tensor(d, s)
    d_codes: {scheme}[96, 160] = nn.quantize(d_smoothed, "{scheme}")
    codes: {scheme}[T, 160] = nn.quantize(act, "{scheme}", 1, s)
    down: f32[T, 96] = nn.scaled_linear(codes, d_codes, None, f32)
    return down
"""


def local_kernels(text: str) -> list[Kernel]:
    return emit_kernels(passes.run(parse(text), ["Shard", "Localize", "GroupKernels"]))


def rounded_by_kernels(paths: list[str], x: torch.Tensor, divisors: torch.Tensor, size: int) -> list[torch.Tensor]:
    """The bytes that each rank's kernels make of its part of the rows; where Triton interprets."""
    absmax, product = map(load_kernel_file, paths)
    parts = [(part.contiguous(), vector) for part, vector in zip(x.chunk(2, 1), divisors.chunk(2))]
    own = [torch.full((len(x), 1), torch.nan) for _ in parts]
    packed = [torch.zeros(len(x), size, dtype=torch.uint8) for _ in parts]
    for (part, vector), largest in zip(parts, own):
        absmax.launch(part, vector, largest)
    for (part, vector), made in zip(parts, packed):
        product.launch_down_rows(part, vector, torch.cat(own, 1), made)
    return packed


@pytest.mark.parametrize("scheme", ["int8d", "fp8"])
def test_kernels_of_ranks_round_parts_as_whole_rows(scheme: str, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    how, kernels = scheme_of(scheme), {kernel.name: kernel for kernel in local_kernels(ROUNDED.format(scheme=scheme))}
    assert how is not None and list(kernels) == ["up", "absmax", "down", "all_reduce"]
    paths = {name: tmp_path / f"{name}.py" for name in ("absmax", "down")}
    for name, path in paths.items():
        path.write_text(kernels[name].source)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 160, generator=generator) * torch.logspace(1, -6, 9)[:, None]
    x[4], divisors = 0, torch.rand(160, generator=generator) + 0.2
    found = pool.submit(rounded_by_kernels, list(map(str, paths.values())), x, divisors, how.row_bytes(80)).result()
    codes, factors, _ = unpack(quantize(x / divisors, how), how, 160)
    packed = [unpack(part, how, 80) for part in found]
    assert torch.equal(torch.cat([part.float() for part, _, _ in packed], 1), codes.float())
    assert all(torch.equal(part, factors) for _, part, _ in packed)


@pytest.mark.parametrize("scheme", ["int8d", "fp8"])
def test_kernels_fit_the_registers_of_gpus(scheme: str, tmp_path: Path) -> None:
    text = ROUNDED.format(scheme=scheme).replace("96", "4096").replace("160", "8192")
    kernels = {kernel.name: kernel for kernel in local_kernels(text)}
    for name, variant in (("absmax", "ABSMAX"), ("down", "DOWN_ROWS")):
        path = tmp_path / f"{name}.py"
        path.write_text(kernels[name].source)
        compiled = compile_variant(getattr(load_kernel_file(str(path)), variant), 90)
        assert "ld.global.v4" in compiled.ptx
