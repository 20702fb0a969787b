"""Who is measured: one small interface for Fuseline and everybody it is compared with."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from ..options import OptionError
from .shapes import Source
from .workloads import Request

OURS = "fuseline"

_PEERS = {
    "eager": ("huggingface", "Eager"),
    "torch-compile": ("torch_compile", "TorchCompile"),
    "hf-batching": ("hf_batching", "ContinuousBatching"),
    "vllm": ("vllm", "Vllm"),
}


class NotMeasured(Exception):
    """A peer that is not there, or cannot do a workload; the message is the reason."""


@dataclass(frozen=True)
class Setup:
    """What every participant gets.

    source           the model
    max_batch_size   most sequences in a step
    max_seq_len      most tokens of a sequence, prompt and answer
    max_step_tokens  most tokens of a step (Fuseline); ``None`` is its default
    memory           share of the device's memory for weights, KV cache and workspace together
    quantization     schemes of Fuseline's weights, as a command line states them; kv_cache: the type of its KV cache
    tensor_parallel  ranks that the model is divided among
    expert_parallel  patterns of weights of experts of which each rank has some whole (of vLLM's all, if there is any)
    """

    source: Source
    max_batch_size: int
    max_seq_len: int
    max_step_tokens: int | None = None
    memory: float = 0.85
    quantization: str | None = None
    kv_cache: str | None = None
    tensor_parallel: int = 1
    expert_parallel: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The element type, and among how many ranks the model is divided."""
        ranks = f", {self.tensor_parallel} ranks" if self.tensor_parallel > 1 else ""
        ranks += ", experts divided" if self.expert_parallel else ""
        return str(self.source.dtype).removeprefix("torch.") + ranks

    @property
    def rounding(self) -> str:
        """What Fuseline rounds beyond the element type, for results; empty if nothing."""
        cache = f"{self.kv_cache} KV" if self.kv_cache else None
        return ", ".join(filter(None, (self.quantization, cache)))


@dataclass(frozen=True)
class Served:
    """The tokens of one request, and when each was there: seconds from the start of the run."""

    tokens: list[int]
    times: list[float]


class Peer(ABC):
    """Generates greedily and never stops at an end token.

    ``same_weights`` says whether its tokens can be compared with those of the model. ``warm_tokens`` is after how many
    tokens of a first run it is as fast as it gets; ``None`` asks for a whole run. ``prefills`` says whether its prefill is
    worth a measurement, ``divides`` whether it can divide a model among ranks.
    """

    name = ""
    same_weights = True
    warm_tokens: int | None = None
    prefills = True
    divides = False

    @abstractmethod
    def __init__(self, setup: Setup) -> None:
        """Make ready to generate. Raises NotMeasured if what it needs is not there."""

    @abstractmethod
    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        """Exactly ``new_tokens`` tokens for each prompt, all prompts of one length."""

    def serve(self, requests: Sequence[Request]) -> list[Served]:
        """Serve requests as they arrive. Raises NotMeasured if that is beyond it."""
        raise NotMeasured("runs whole batches only")

    def step_ms(self, batch: int, context: int) -> float | None:
        """Milliseconds of the device for one decode step (a CUDA graph's replay), without the host; if it can tell."""
        return None

    def steps(self) -> int | None:
        """Steps done so far, if it counts them."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Give the memory back."""


def start(name: str, setup: Setup) -> Peer:
    """Make a participant ready to generate.

    Raises:
        NotMeasured: what it needs is not installed, or it runs on one device and ranks are asked for.
        OptionError: there is no peer of that name.
    """
    module, kind = (OURS, "Fuseline") if name == OURS else _PEERS[known(name)]
    made: type[Peer] = getattr(importlib.import_module(f".{module}", __package__), kind)
    if setup.tensor_parallel > 1 and not made.divides:
        raise NotMeasured(f"runs on one device, and this is about {setup.tensor_parallel} ranks")
    return made(setup)


def known(name: str) -> str:
    """The name, if there is such a peer. Raises OptionError otherwise."""
    if name not in _PEERS:
        raise OptionError(f"--against {name}: there is no such peer; use some of {','.join(_PEERS)}")
    return name
