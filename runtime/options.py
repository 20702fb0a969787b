"""What a caller may choose when compiling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir.capture import MAX_STEP_TOKENS
from ..ir.errors import OptionError as OptionError
from ..ir.graph import Graph
from ..ir.placement import OPTION as TENSOR_PARALLEL
from ..ir.schemes import ALIASES
from ..ir.schemes import NAMES as SCHEMES


@dataclass(frozen=True)
class KVCacheConfig:
    """The KV cache: tokens a block, tokens in all (``None``: as many as are useful and fit), element type.

    ``dtype`` is the model's (``None``), or ``"int8"`` or ``"fp8"`` (E4M3): each head of each token is rounded by itself,
    with a factor of its own in bf16.

    What fits on a GPU is what weights and steps leave of ``memory_share`` of its memory, all that is in use counted.
    """

    block_size: int = 16
    max_tokens: int | None = None
    memory_share: float = 0.85
    dtype: torch.dtype | str | None = None


@dataclass(frozen=True)
class Options:
    """The options of one compile, resolved: nothing is left to a default."""

    device: torch.device
    dtype: torch.dtype
    max_batch_size: int
    max_seq_len: int
    max_step_tokens: int
    kv_cache: KVCacheConfig
    kv_dtype: str | None = None
    quantization: Mapping[str, str | None] = field(default_factory=dict)
    calibrated: bool = False
    smoothing: bool = False
    tensor_parallel: int = 1
    replicated: tuple[str, ...] = ()
    expert_parallel: tuple[str, ...] = ()
    graphs: bool = False
    lookahead: bool = False


_KV_DTYPES = {"int8": "i8", "fp8": "f8e4m3", "float8_e4m3fn": "f8e4m3"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, or the GPU if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    found = torch.device(device)
    if found.type not in ("cpu", "cuda"):
        raise OptionError(f"device {found} is not supported; use 'cpu' or 'cuda'")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device {found} was asked for, but torch sees no GPU; use device='cpu'")
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The element type asked for, or bf16 on a GPU and fp32 on the CPU."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise OptionError(f"dtype {dtype} is not supported; use float32, bfloat16 or float16")
    return found  # type: ignore[return-value]


def positive(name: str, value: object) -> int:
    """Check that an option is a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name} must be a whole number of at least 1, not {value!r}")
    return value


def resolve_quantization(quantization: object) -> dict[str, str | None]:
    """Schemes by name pattern: one scheme is that of all projections, ``"*"``; ``None`` leaves all as they are.

    Raises:
        OptionError: there is no such scheme, or a pattern that no dump could state.
    """
    wanted = {"*": quantization} if isinstance(quantization, str) else quantization
    if wanted is None:
        return {}
    if not isinstance(wanted, Mapping):
        raise OptionError(f"quantization must be a scheme or schemes by name pattern, not {quantization!r}")
    resolve_patterns("quantization", wanted)
    for scheme in wanted.values():
        if scheme is not None and scheme not in SCHEMES:
            raise OptionError(f"quantization: there is no scheme {scheme!r}; use one of {', '.join(SCHEMES)}")
    return {pattern: ALIASES.get(scheme, scheme) if scheme else None for pattern, scheme in wanted.items()}


def resolve_patterns(name: str, patterns: Iterable[object]) -> tuple[str, ...]:
    """Patterns of weight names that a dump can state.

    Raises:
        OptionError: one is none.
    """
    found = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str) or not pattern or not set(pattern).isdisjoint(',: "\\'):
            raise OptionError(f"{name}: {pattern!r} is no pattern of weight names, such as '*.down_proj'")
        found.append(pattern)
    return tuple(found)


def refuse_ranks(
    ranks: int, simulate: bool, patterns: Mapping[str, Sequence[str]], calibrated: bool, model: object
) -> None:
    """Check the options about ranks against each other, and against a graph that was made for some.

    ``patterns`` are those of weights, by option; ``calibrated`` says that weights are to be calibrated.

    Raises:
        OptionError: they do not go together.
    """
    if ranks == 1 and simulate:
        raise OptionError("simulate=True is for several ranks: pass tensor_parallel=2 or more, or leave it out")
    for name, wanted in patterns.items():
        if ranks == 1 and wanted:
            raise OptionError(
                f"{name}={wanted!r} is for several ranks: pass tensor_parallel=2 or more, or leave it out"
            )
    if ranks > 1 and calibrated and isinstance(model, Graph):
        raise OptionError("calibration with tensor_parallel is for a model, not for a graph from a dump: leave it out")
    stated = model.options.get(TENSOR_PARALLEL, 1) if isinstance(model, Graph) else ranks
    if stated != ranks:
        raise OptionError(f"the graph is for {stated} ranks: pass tensor_parallel={stated}")


def refuse_schemes(wanted: Mapping[str, str | None], device: torch.device) -> None:
    """Check that a device computes with the schemes asked for.

    Raises:
        OptionError: fp8 on a GPU without tensor cores for it.
    """
    if device.type != "cuda" or "fp8" not in wanted.values():
        return
    found = torch.cuda.get_device_capability(device)
    if found < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise OptionError(
            f"quantization: fp8 needs a GPU of compute capability 8.9; {name} has {found[0]}.{found[1]}; "
            "use 'int8-dynamic' or 'int8'"
        )


def quantization_of(text: str) -> str | dict[str, str | None]:
    """A scheme, or schemes by pattern as a command line states them: ``*.down_proj=int8,*.o_proj=none,*=int4``."""
    if "=" not in text:
        return text
    pairs = [item.partition("=") for item in text.split(",")]
    return {pattern: None if scheme == "none" else scheme for pattern, _, scheme in pairs}


def refuse_later(schedule: str, kv_cache: KVCacheConfig) -> None:
    """Options whose place in the signature is fixed but which are not built yet."""
    if schedule not in ("auto", "split"):
        raise OptionError(f"schedule={schedule!r} is not available yet; use 'auto' or 'split'")
    if kv_cache.block_size not in (8, 16, 32, 64, 128, 256):
        raise OptionError(f"KVCacheConfig.block_size must be a power of two from 8 to 256, not {kv_cache.block_size}")


def resolve_kv_dtype(asked: torch.dtype | str | None, dtype: torch.dtype, device: torch.device) -> str | None:
    """The element type of the codes that a KV cache holds, as the text form names it; ``None`` if it holds numbers.

    Raises:
        OptionError: there is no such type, or the GPU does not have it.
    """
    name = str(asked).removeprefix("torch.") if asked is not None else None
    if name is None or _DTYPES.get(name) == dtype:
        return None
    if name not in _KV_DTYPES:
        raise OptionError(f"KVCacheConfig.dtype {asked!r} is not supported; use 'int8', 'fp8' or None, the model's own")
    found = _KV_DTYPES[name]
    if found == "f8e4m3" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise OptionError(f"KVCacheConfig.dtype: the {name} has no fp8, which needs compute capability 8.9; use 'int8'")
    return found


def resolve(
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    max_batch_size: int,
    max_seq_len: int | None,
    max_step_tokens: int | None,
    kv_cache: KVCacheConfig,
) -> Options:
    """Check the sizes that were asked for, and choose those that were left open by the model's config.

    Raises:
        OptionError: a size makes no sense, or is more than the model or a step can take.
    """
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if max_seq_len is None:
        max_seq_len = int(limit) if limit and limit > 0 else 4096
    positive("max_seq_len", max_seq_len)
    if limit is not None and 0 < limit < max_seq_len:
        raise OptionError(f"max_seq_len={max_seq_len} is more than the model's max_position_embeddings={limit}")
    if max_step_tokens is None:
        max_step_tokens = 8192 if device.type == "cuda" else 512
    batch = positive("max_batch_size", max_batch_size)
    if positive("max_step_tokens", max_step_tokens) > MAX_STEP_TOKENS:
        raise OptionError(f"max_step_tokens={max_step_tokens} is more than {MAX_STEP_TOKENS}")
    share = kv_cache.memory_share
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise OptionError(f"KVCacheConfig.memory_share must be a number above 0 and at most 1, not {share!r}")
    if kv_cache.max_tokens is not None:
        positive("KVCacheConfig.max_tokens", kv_cache.max_tokens)
    kv_dtype = resolve_kv_dtype(kv_cache.dtype, dtype, device)
    return Options(device, dtype, batch, max_seq_len, max(max_step_tokens, batch), kv_cache, kv_dtype)
