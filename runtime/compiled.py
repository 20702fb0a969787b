"""``CompiledModel``: what ``compile`` returns."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..codegen.kernels import Kernel
from ..ir.errors import InvalidRequestError
from ..ir.graph import Graph
from ..ir.unfold import Unfolded
from .decode import DecodeSteps
from .dumps import Dump
from .engine import Engine
from .events import Stats, TokenEvent
from .nccl import settle
from .options import Options
from .report import Report
from .sequence import SamplingParams


@dataclass(frozen=True)
class Scores:
    """``logits [B, S, vocab]``; rows of padding are zero."""

    logits: Tensor


class CompiledModel:
    """A compiled model: generates, scores, and shows what it is made of.

    ``graph`` is the lowered graph (``str(graph)`` its text), ``kernels`` the emitted kernels, ``report`` the account of
    the compile, ``engine`` the continuous-batching engine underneath.
    """

    def __init__(
        self,
        whole: Unfolded,
        kernels: SequenceOf[Kernel],
        report: Report,
        engine: Engine,
        decode: DecodeSteps,
        options: Options,
        generation_config: Any,
        config: Any,
    ) -> None:
        self._whole = whole
        self.kernels = list(kernels)
        self.report = report
        self.engine = engine
        self._decode = decode
        self._on_close: Callable[[], object] | None = None
        self.options = options
        self.config = config
        self.eos_token_ids = _token_ids(
            getattr(generation_config, "eos_token_id", None), getattr(config, "eos_token_id", None)
        )
        pads = _token_ids(getattr(generation_config, "pad_token_id", None), getattr(config, "pad_token_id", None))
        self.pad_token_id = next(iter(pads or self.eos_token_ids), 0)

    @property
    def graph(self) -> Graph:
        """The lowered graph with all layers of the model; it is written out when it is asked for."""
        return self._whole.graph

    @property
    def stats(self) -> Stats:
        """What the engine has done so far."""
        return self.engine.stats

    def generate(
        self,
        prompts: Tensor | SequenceOf[SequenceOf[int]],
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 16,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_token_ids: SequenceOf[int] | None = None,
        progress: bool = False,
    ) -> Any:
        """Generate after each prompt.

        Args:
            prompts: token lists, or a tensor ``[B, S]`` whose padding ``attention_mask [B, S]`` marks with 0.
            temperature: 0 is greedy. stop_token_ids: ``None`` are the model's own end tokens, ``[]`` none; the stop
                token is the last token of its answer.

        Returns:
            The new tokens of each prompt as lists; for a tensor the tensor ``[B, S + N]`` as ``transformers`` returns
            it: the prompts, then the new tokens, padded at the end.

        Raises:
            InvalidRequestError: a prompt cannot be served; names its index. Nothing has been generated then.
        """
        stops = tuple(self.eos_token_ids if stop_token_ids is None else stop_token_ids)
        params = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed, stops)
        lists = _token_lists(prompts, attention_mask)
        for index, prompt in enumerate(lists):
            try:
                self.engine.validate(prompt, params)
            except InvalidRequestError as error:
                raise InvalidRequestError(f"prompts[{index}]: {error}") from error
        ids = [self.engine.add(prompt, params) for prompt in lists]
        with tqdm(
            total=len(ids) * max_new_tokens,
            desc="generate",
            unit="tok",
            file=sys.stderr,
            disable=not progress,
            leave=False,
        ) as bar:

            def count(event: TokenEvent) -> None:
                bar.update()

            done = self.engine.run(count)
        answers = [list(done[identity].output) for identity in ids]
        if not isinstance(prompts, Tensor):
            return answers
        width = max(map(len, answers), default=0)
        tail = torch.full((len(answers), width), self.pad_token_id, dtype=prompts.dtype)
        for row, answer in zip(tail, answers):
            row[: len(answer)] = torch.tensor(answer, dtype=prompts.dtype)
        return torch.cat((prompts, tail.to(prompts.device)), 1)

    def __call__(self, input_ids: Tensor | SequenceOf[SequenceOf[int]], attention_mask: Tensor | None = None) -> Scores:
        """The logits of every token: ``Scores`` with ``logits [B, S, vocab]``, for scoring and evaluation."""
        lists = _token_lists(input_ids, attention_mask)
        parts = self.engine.score(lists)
        if isinstance(input_ids, Tensor):
            mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        else:
            width = max(map(len, lists))
            mask = torch.tensor([[place < len(item) for place in range(width)] for item in lists])
        logits = parts[0].new_zeros((*mask.shape, parts[0].shape[-1]))
        for row, keep, part in zip(logits, mask.to(logits.device), parts):
            row[keep] = part
        return Scores(logits)

    def decode_step_ms(self, batch: int, context: int, repeats: int = 50) -> float:
        """Median milliseconds of the model's part of one decode step of ``batch`` sequences of ``context`` tokens each.

        On a GPU by its own clock: a replay of the CUDA graph for that batch, sampling of greedy tokens included. On the
        CPU the wall time of the padded step.

        Raises:
            InvalidRequestError: no such step can come, or requests are in flight, whose state this would spoil.
        """
        if self.engine.has_work:
            raise InvalidRequestError("requests are in flight: finish or abort them first")
        if not (
            1 <= batch <= self.options.max_batch_size and 1 <= context <= self.options.max_seq_len and repeats >= 1
        ):
            raise InvalidRequestError(
                f"no decode step of {batch} sequences of {context} tokens can come, or be timed {repeats} times: "
                f"max_batch_size is {self.options.max_batch_size}, max_seq_len {self.options.max_seq_len}"
            )
        self.engine.tell("decode_step_ms", batch, context, repeats)
        found = self._decode.milliseconds(batch, context, repeats)
        settle(self.engine.group)
        return found

    def dump(self, directory: str | Path) -> None:
        """Write the graph, the kernels and the report. (``compile(dump=...)`` also writes the text after each pass.)"""
        record = Dump(directory)
        record.graph("graph", self.graph)
        record.finish(self.kernels, self.report)

    def close(self) -> None:
        """End the processes of the other ranks, if ``compile`` started them; the model cannot be used then any more.

        It happens by itself when the model is forgotten, or Python ends.
        """
        if self._on_close is not None:
            self._on_close()

    def end_with(self, end: Callable[[], object]) -> None:
        """Have ``end`` called once, when the model is closed or forgotten, or Python ends."""
        self._on_close = weakref.finalize(self.engine, _close, self._decode, end)

    def save(self, directory: str | Path) -> None:
        """Not available yet."""
        from .options import OptionError

        raise OptionError("saving a compiled engine is not available yet; keep the model and compile it again")

    def __repr__(self) -> str:
        return f"<CompiledModel {self.report.model}, {self.report.dtype} on {self.report.device}>"


def _close(decode: DecodeSteps, end: Callable[[], object]) -> None:
    decode.close()  # NCCL waits, before it ends, for the CUDA graphs that its kernels are in
    end()


def _token_ids(*candidates: Any) -> list[int]:
    """The first candidate that is set, as a list."""
    for item in candidates:
        if item is not None:
            return [int(token) for token in (item if isinstance(item, (list, tuple)) else [item])]
    return []


def _token_lists(prompts: Tensor | SequenceOf[SequenceOf[int]], attention_mask: Tensor | None) -> list[list[int]]:
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.is_floating_point():
            raise InvalidRequestError(
                f"prompts are a tensor {tuple(prompts.shape)} {prompts.dtype}: pass integers of shape [B, S]"
            )
        if attention_mask is None:
            return [row.tolist() for row in prompts]
        if attention_mask.shape != prompts.shape:
            raise InvalidRequestError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, prompts {tuple(prompts.shape)}: they must agree"
            )
        mask = attention_mask.bool().cpu()
        for index, row in enumerate(mask.tolist()):
            kept = [place for place, seen in enumerate(row) if seen]
            if kept and len(kept) != kept[-1] - kept[0] + 1:
                raise InvalidRequestError(
                    f"prompts[{index}]: attention_mask has a hole between tokens; pad at the ends only"
                )
        return [row[keep].tolist() for row, keep in zip(prompts.cpu(), mask)]
    if attention_mask is not None:
        raise InvalidRequestError("attention_mask goes with a tensor of prompts; token lists need no padding")
    if isinstance(prompts, str) or any(not isinstance(item, (list, tuple)) for item in prompts):
        raise InvalidRequestError("prompts are a list of token lists, or a tensor [B, S]; tokenize text first")
    return [list(item) for item in prompts]
