"""Compiling emitted files without a GPU: what is refused, and that the interpreter does not get in the way."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from fuseline.codegen.offline import KernelResourceError, Resources, check_file, compile_variant, load_kernel_file
from fuseline.ir.errors import FuselineError

HEAD = """\
import triton
import triton.language as tl

"""
COPY = (
    HEAD
    + '''\
@triton.jit
def copy(source_ptr, target_ptr, count, BLOCK: tl.constexpr):
    """Copies one row of `count` numbers per program."""
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(target_ptr + tl.program_id(0) * count + i, tl.load(source_ptr + tl.program_id(0) * count + i))


VARIANTS = [
    {
        "kernel": copy,
        "signature": {"source_ptr": "*fp32", "target_ptr": "*fp32", "count": "i32"},
        "constexprs": {"BLOCK": 512},
        "num_warps": 4,
        "num_stages": 1,
    }
]
'''
)
# All rows of a 128 x 256 product stay in the registers of 64 threads: 512 numbers each.
PRODUCT = (
    HEAD
    + '''\
@triton.jit
def product(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """The square of a matrix product, in place."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, 4096, K):
        x = tl.load(x_ptr + m[:, None] * 4096 + start + k[None, :])
        y = tl.load(y_ptr + (start + k)[:, None] * N + n[None, :])
        acc = tl.dot(x, y, acc)
    tl.store(y_ptr + m[:, None] * N + n[None, :], (acc * acc).to(tl.float16))


VARIANTS = [
    {
        "kernel": product,
        "signature": {"x_ptr": "*fp16", "y_ptr": "*fp16"},
        "constexprs": {"M": 128, "N": 256, "K": $K$},
        "num_warps": $WARPS$,
        "num_stages": 3,
    }
]
'''
)


def write(folder: Path, text: str, **words: int) -> Path:
    for name, value in words.items():
        text = text.replace(f"${name}$", str(value))
    path = folder / "kernel.py"
    path.write_text(text)
    return path


def test_resources_of_a_file(tmp_path: Path) -> None:
    found = check_file(write(tmp_path, COPY))
    assert [resources.target for resources in found] == ["sm_80", "sm_90"]
    for resources in found:
        assert resources.kernel == "copy" and resources.spill_bytes == 0 and 0 < resources.registers < 256
        assert ".visible .entry copy" in resources.ptx


def test_an_integer_is_divisible_only_if_the_variant_says_so(tmp_path: Path) -> None:
    """Rows of any length begin anywhere, so their loads cannot be wide; told otherwise, they are."""
    variant = load_kernel_file(write(tmp_path, COPY)).VARIANTS[0]
    assert "ld.global.v4" not in compile_variant(variant, 90).ptx
    assert "ld.global.v4" in compile_variant({**variant, "divisible_by_16": ["count"]}, 90).ptx


def test_spills_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KernelResourceError, match=r"kernel\.py: product for sm_80.*num_warps=2: spills \d+ bytes"):
        check_file(write(tmp_path, PRODUCT, K=32, WARPS=2), (80,))


def test_too_much_shared_memory_is_refused(tmp_path: Path) -> None:
    """Three stages of 128 x 128 and 128 x 256 halves: 192 KB in two buffers, which sm_90 has and sm_80 has not."""
    path = write(tmp_path, PRODUCT, K=128, WARPS=8)
    with pytest.raises(KernelResourceError, match="needs 196608 bytes of shared memory, the target has 166912"):
        check_file(path, (80,))


def test_a_variant_must_name_every_argument(tmp_path: Path) -> None:
    variant = load_kernel_file(write(tmp_path, COPY)).VARIANTS[0]
    with pytest.raises(FuselineError, match="count"):
        compile_variant({**variant, "signature": {"source_ptr": "*fp32", "target_ptr": "*fp32"}}, 80)


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FuselineError, match="75"):
        check_file(write(tmp_path, COPY), (75,))


def test_a_rewritten_file_is_read_again(tmp_path: Path) -> None:
    first = load_kernel_file(write(tmp_path, COPY))
    assert load_kernel_file(tmp_path / "kernel.py") is first
    second = load_kernel_file(write(tmp_path, COPY.replace("512", "256")))
    assert [module.VARIANTS[0]["constexprs"]["BLOCK"] for module in (first, second)] == [512, 256]


def test_a_file_that_fails_to_load_leaves_no_module(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            load_kernel_file(write(tmp_path, "1 / 0\n"))


def check_module(path: str) -> list[Resources]:
    return check_file(load_kernel_file(path))


def test_interpreted_modules_are_compiled_elsewhere(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    path = write(tmp_path, COPY)
    assert pool.submit(check_module, str(path)).result() == check_file(path)


def test_spills_are_refused_under_the_interpreter(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    with pytest.raises(KernelResourceError, match="spills"):
        pool.submit(check_module, str(write(tmp_path, PRODUCT, K=32, WARPS=2))).result()
