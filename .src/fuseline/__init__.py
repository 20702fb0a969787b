"""Fuseline compiles an unmodified Hugging Face causal LM into fused Triton kernels and serves it from a paged KV cache."""

from . import ir, passes
from .ir import (
    ExpectationError,
    FuselineError,
    InvalidRequestError,
    UnsupportedModelError,
    VerificationError,
    WeightsError,
)
from .runtime.compile import compile
from .runtime.compiled import CompiledModel
from .runtime.load import load
from .runtime.calibration.texts import Calibration
from .runtime.mpi import RankError
from .runtime.options import KVCacheConfig, OptionError
from .runtime.quantize import quantize

__version__ = "0.1.0"

__all__ = [
    "CompiledModel",
    "ExpectationError",
    "FuselineError",
    "InvalidRequestError",
    "Calibration",
    "KVCacheConfig",
    "OptionError",
    "RankError",
    "UnsupportedModelError",
    "VerificationError",
    "WeightsError",
    "compile",
    "ir",
    "load",
    "passes",
    "quantize",
]
