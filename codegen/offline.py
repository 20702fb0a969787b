"""Compile emitted kernel files for GPUs that are not here, and refuse those that spill or do not fit."""

import hashlib
import importlib.util
import json
import linecache
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from ..ir.errors import FuselineError

# Shared memory one block may use, in bytes: 163 KB on sm_80 (A100), 227 KB on sm_90 (H100, H200).
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}


class KernelResourceError(FuselineError):
    """An emitted kernel spills registers, or needs more shared memory than its target has."""


@dataclass(frozen=True)
class Resources:
    """What one specialisation of one kernel needs on one target.

    ``registers`` and ``spill_bytes`` (stack and local memory) are for one thread, ``shared_bytes`` for one block.
    """

    kernel: str
    target: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    ptx: str


class _FreshLoader(SourceFileLoader):
    """Compiles the source at every load: a file rewritten within a second must not meet stale bytecode."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_kernel_file(path: str | Path) -> ModuleType:
    """Import an emitted file as a module of its own; the name depends on the path and on the text."""
    path = Path(path).resolve()
    text = path.read_text()
    name = "fuseline_kernel_" + hashlib.sha256(f"{path}\0{text}".encode()).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    linecache.checkcache(str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=_FreshLoader(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def compile_variant(variant: dict[str, Any], capability: int) -> Resources:
    """Compile one entry of a file's ``VARIANTS`` for ``sm_<capability>``; no GPU is needed.

    Pointers are taken to be 16-byte aligned, integers only where ``variant["divisible_by_16"]`` names them. A variant
    may set ``maxnreg``: left alone, the assembler accepts small spills for the sake of more resident warps.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    kernel, types, constexprs = variant["kernel"], variant["signature"], dict(variant["constexprs"])
    if "PDL" in constexprs:
        constexprs["PDL"] = capability >= 90  # programmatic dependent launch
    if not isinstance(kernel, JITFunction):
        raise FuselineError(f"{kernel.__name__}: interpreted (TRITON_INTERPRET is set); only check_file can compile it")
    unknown = set(kernel.arg_names) ^ (set(types) | set(constexprs))
    if unknown:
        raise FuselineError(f"{kernel.__name__}: the variant and the kernel differ in arguments: {sorted(unknown)}")
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = set(variant.get("divisible_by_16", ()))
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in aligned
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options: dict[str, Any] = {
        name: variant[name] for name in ("num_warps", "num_stages", "maxnreg") if name in variant
    }
    options["enable_fp_fusion"] = True
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _resource_usage(Path(triton.__file__).parent, compiled.asm["cubin"])
    return Resources(
        kernel=kernel.__name__,
        target=f"sm_{capability}",
        registers=usage["REG"],
        shared_bytes=compiled.metadata.shared,
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        ptx=compiled.asm["ptx"],
    )


def _resource_usage(triton_folder: Path, cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of a cubin: the assembler's own account, which triton.compile leaves unread."""
    tool = triton_folder / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True).stdout
    fields = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    if fields.keys() != {"REG", "STACK", "LOCAL"}:
        raise FuselineError(f"cuobjdump -res-usage printed no register and stack usage:\n{text}")
    return fields


def check_file(path_or_module: str | Path | ModuleType, capabilities: Iterable[int] = (80, 90)) -> list[Resources]:
    """Compile every variant of an emitted file for every capability, or for those that it names itself.

    Raises ``KernelResourceError`` naming kernel, variant and number when one spills or exceeds the target's shared
    memory. Under ``TRITON_INTERPRET`` (where nothing can be compiled) a child process without it does the compiling.
    """
    if isinstance(path_or_module, ModuleType):
        path = Path(path_or_module.__file__ or "")
    else:
        path = Path(path_or_module)
    capabilities = tuple(capabilities)
    unknown = [capability for capability in capabilities if capability not in SHARED_LIMITS]
    if unknown:
        raise FuselineError(f"no shared memory limit is known for {unknown}; known: {sorted(SHARED_LIMITS)}")
    if _interpreting():
        found = _compile_in_child(path, capabilities)
    else:
        found = _compile_file(path, capabilities)
    problems = [problem for label, resources in found if (problem := _problem(path, label, resources))]
    if problems:
        raise KernelResourceError("\n".join(problems))
    return [resources for _, resources in found]


def _interpreting() -> bool:
    """True if the variable is set now, or was when triton was imported: its own functions are interpreted then."""
    from triton import knobs, language
    from triton.runtime.jit import JITFunction

    return bool(knobs.runtime.interpret) or not isinstance(language.cdiv, JITFunction)


def _compile_file(path: Path, capabilities: tuple[int, ...]) -> list[tuple[str, Resources]]:
    found = []
    for index, variant in enumerate(load_kernel_file(path).VARIANTS):
        label = f"VARIANTS[{index}] {variant['constexprs']} num_warps={variant['num_warps']}"
        wanted = [capability for capability in capabilities if capability in variant.get("capabilities", capabilities)]
        found += [(label, compile_variant(variant, capability)) for capability in wanted]
    return found


def _compile_in_child(path: Path, capabilities: tuple[int, ...]) -> list[tuple[str, Resources]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    package_root = str(Path(__file__).absolute().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", __name__, str(path.resolve()), *map(str, capabilities)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise FuselineError(f"{path}: compiling in a child process failed:\n{done.stderr}")
    return [(label, Resources(**fields)) for label, fields in json.loads(done.stdout.splitlines()[-1])]


def _problem(path: Path, label: str, resources: Resources) -> str | None:
    where = f"{path.name}: {resources.kernel} for {resources.target}, {label}"
    limit = SHARED_LIMITS[int(resources.target.removeprefix("sm_"))]
    if resources.spill_bytes:
        return f"{where}: spills {resources.spill_bytes} bytes a thread at {resources.registers} registers"
    if resources.shared_bytes > limit:
        return f"{where}: needs {resources.shared_bytes} bytes of shared memory, the target has {limit}"
    return None


if __name__ == "__main__":
    compiled_file = _compile_file(Path(sys.argv[1]), tuple(map(int, sys.argv[2:])))
    print(json.dumps([(label, asdict(resources)) for label, resources in compiled_file]))
