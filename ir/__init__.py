"""The graph of a model: its operators, types and text, and the capture from Hugging Face."""

from . import absmax as _absmax
from . import attention as _attention
from . import dist as _dist
from . import nn as _operators
from . import placement_rules as _placement_rules
from . import placement_shapes as _placement_shapes
from . import quantized as _quantized
from .dump import dump
from .errors import (
    ExpectationError,
    FuselineError,
    InvalidRequestError,
    UnsupportedModelError,
    VerificationError,
    WeightsError,
)
from .graph import Graph, Region
from .parse import ParseError, parse
from .types import Dim, TensorType
from .verify import verify

__all__ = [
    "Dim",
    "ExpectationError",
    "FuselineError",
    "Graph",
    "InvalidRequestError",
    "ParseError",
    "Region",
    "TensorType",
    "UnsupportedModelError",
    "VerificationError",
    "WeightsError",
    "dump",
    "parse",
    "verify",
]
del _absmax, _attention, _dist, _operators, _placement_rules, _placement_shapes, _quantized
