"""Serves requests: one validator at the door, then steps of the scheduler, the model and the sampler."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import torch

from ..ir.dist import ALONE, Group
from ..ir.errors import InvalidRequestError
from .decode import DecodeSteps
from .events import Stats, TokenEvent
from .mpi import RankError
from .nccl import settle
from .pool import BlockPool, PoolError
from .runner import Flight, Runner
from .sampler import not_finite
from .scheduler import Chunk, Scheduler
from .scoring import score_all
from .sequence import SamplingParams, Sequence, validate_prompt
from .step import Model
from .vocabulary import Vocabulary

Tell = Callable[..., None]


def _nobody(name: str, *values: object) -> None:
    """There is no one to tell."""


class Engine:
    """Generates tokens for any number of requests at once. Not for use by several threads.

    A request's tokens do not depend on what it is batched with, as far as the model's logits do not.
    If a step raises, every request not yet finished ends with that exception: the engine is then empty and usable.

    With ``lookahead`` the next step is launched before the tokens of the last are waited for: it takes them on the
    device. A sequence that turns out to have ended then computes one token too many, which is dropped.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int,
        block_size: int,
        max_batch_size: int,
        max_seq_len: int,
        max_step_tokens: int,
        vocabulary: Vocabulary,
        device: torch.device | str,
        decode: DecodeSteps | None = None,
        lookahead: bool = False,
        group: Group = ALONE,
    ) -> None:
        """``num_blocks`` blocks of ``block_size`` tokens are the cache that ``model`` writes to; it may hold fewer
        than ``max_seq_len`` tokens. ``max_step_tokens`` bounds the tokens of one call of the model,
        and ``decode``, if given, computes the steps that only decode. The engines of the processes in ``group``, which are
        given the same requests in the same order, go on with the tokens that the first of them chooses."""
        if max_seq_len < 1:
            raise ValueError(f"max_seq_len={max_seq_len} must be at least 1")
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(self.pool, max_batch_size, max_step_tokens)
        self.max_seq_len = max_seq_len
        self.vocabulary = vocabulary
        self._runner = Runner(model, block_size, device, max_batch_size, max_seq_len, vocabulary, decode, group)
        self.group = group
        self._lookahead = lookahead
        self.tell: Tell = _nobody
        """Is told of every call that changes something before it is done, by name and arguments: other ranks follow it."""
        self._flight: Flight | None = None
        self._live: dict[int, Sequence] = {}
        self._next_id = 0
        self._steps = self._tokens = self._prefill_tokens = self._decode_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def stats(self) -> Stats:
        return Stats(
            self._steps, self._tokens, self.scheduler.num_preemptions, self._prefill_tokens, self._decode_tokens
        )

    def add(self, prompt: list[int], params: SamplingParams | None = None) -> int:
        """Queue a request and return its id. Raises InvalidRequestError and changes nothing if it cannot be served."""
        params = SamplingParams() if params is None else params
        self.validate(prompt, params)
        if params.seed is None:
            params = dataclasses.replace(params, seed=secrets.randbits(64))
        self.tell("add", list(prompt), params)
        sequence = Sequence(self._next_id, list(prompt), params)
        self._next_id += 1
        self._live[sequence.id] = sequence
        self.scheduler.add(sequence)
        return sequence.id

    def validate(self, prompt: list[int], params: SamplingParams) -> None:
        """Raise InvalidRequestError unless the request can be served, alone at least."""
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"params is of type {type(params).__name__}: pass a SamplingParams")
        params.validate()
        validate_prompt(prompt, self.vocabulary.size)
        length = len(prompt) + params.max_new_tokens
        if length > self.max_seq_len:
            raise InvalidRequestError(
                f"the prompt of {len(prompt)} tokens and max_new_tokens={params.max_new_tokens} make {length}, but "
                f"max_seq_len is {self.max_seq_len}: shorten one of them, or compile with a larger max_seq_len"
            )
        # The last token generated is never fed back.
        self._validate_room(length - 1)

    def step(self) -> list[TokenEvent]:
        """Complete one call of the model and return the tokens it gave; none if it computed only parts of prompts."""
        return self._advance()[0]

    def run(self, on_event: Callable[[TokenEvent], None] | None = None) -> dict[int, Sequence]:
        """Step until all requests are done; return those that finished meanwhile, by id.

        ``on_event`` sees every token in order, and may add and abort requests. If it raises, the step's other events
        are lost, and the requests still unfinished stay in the engine.
        """
        finished: dict[int, Sequence] = {}
        while self.has_work:
            events, ended = self._advance()
            finished.update((sequence.id, sequence) for sequence in ended)
            if on_event is not None:
                for event in events:
                    on_event(event)
        return finished

    def abort(self, sequence_id: int) -> bool:
        """End a request without a further token. False if it is unknown or has ended already."""
        self.tell("abort", sequence_id)
        return self._end(sequence_id)

    def _end(self, sequence_id: int) -> bool:
        sequence = self._live.pop(sequence_id, None)
        if sequence is None:
            return False
        if not sequence.is_closing:
            self.scheduler.remove(sequence)
        return True

    def abort_all(self) -> None:
        """End every request; the pool is then as at the start."""
        self.tell("abort_all")
        self._end_all()

    def _end_all(self) -> None:
        self.scheduler.clear()
        self._live.clear()
        self._flight = None

    def score(self, prompts: SequenceOf[list[int]]) -> list[torch.Tensor]:
        """Logits [len(prompt), V] of every token of each prompt, through the same paged cache.

        Requests in flight lose their blocks meanwhile and are computed again later; their tokens stay the same.
        Raises InvalidRequestError, naming the prompt, before anything is computed, and RankError if a rank is gone. If
        the model raises, the blocks of the prompts are given back and requests in flight go on.
        """
        for index, prompt in enumerate(prompts):
            validate_prompt(prompt, self.vocabulary.size, f"prompts[{index}]")
            if len(prompt) > self.max_seq_len:
                raise InvalidRequestError(
                    f"prompts[{index}] has {len(prompt)} tokens, but max_seq_len is {self.max_seq_len}: shorten it"
                )
            self._validate_room(len(prompt), f"prompts[{index}]")
        self.tell("score", prompts)
        self.scheduler.preempt_all()
        scheduler = Scheduler(self.pool, self.scheduler.max_batch_size, self.scheduler.max_step_tokens)
        scores = score_all(prompts, scheduler, self._all_logits)
        settle(self.group)
        return scores

    def check_integrity(self) -> None:
        """Raise PoolError unless every block is free or owned by one running sequence that has room for its tokens."""
        self.pool.check_integrity(sequence.block_table for sequence in self._live.values())
        queued = [*self.scheduler.running, *self.scheduler.waiting]
        if queued != [sequence for sequence in self._live.values() if not sequence.is_closing]:
            raise PoolError("the scheduler does not hold the unfinished requests in order of arrival")
        for sequence in queued:
            if len(sequence.block_table) < self.pool.blocks_for(sequence.num_computed):
                raise PoolError(f"sequence {sequence.id} has too few blocks for {sequence.num_computed} tokens")
        if any(sequence.block_table for sequence in self.scheduler.waiting):
            raise PoolError("a waiting sequence owns blocks")

    def _advance(self) -> tuple[list[TokenEvent], list[Sequence]]:
        """Complete one step: its events, and the sequences that ended with it."""
        if not self._live:
            # What may still be under way are tokens too many: nobody waits for them.
            self._flight = None
            return [], []
        self.tell("step")
        try:
            flight = self._flight or self._launch()
            self._flight = self._launch() if self._lookahead else None
            assert flight is not None, "requests that live are in the scheduler or under way"
            return self._land(flight)
        except BaseException as error:
            self._end_all()
            try:
                self.tell("abort_all")  # where it happened here alone
            except RankError as gone:
                raise gone from error
            raise

    def _launch(self) -> Flight | None:
        """Launch the next step; None if every request has its last token under way."""
        if not self.scheduler.has_work:
            return None
        chunks = self.scheduler.schedule()
        flight = self._runner.launch(chunks)
        self._count(chunks)
        for row, sequence in enumerate(flight.sequences):
            sequence.expect(row)
            if sequence.num_tokens >= sequence.max_tokens:
                # Whoever gets its blocks writes to them after this step, which is launched already.
                self.scheduler.remove(sequence)
        return flight

    def _land(self, flight: Flight) -> tuple[list[TokenEvent], list[Sequence]]:
        """Wait for the tokens of a step and hand them out."""
        tokens, finite = flight.choices.wait()
        events: list[TokenEvent] = []
        ended: list[Sequence] = []
        if not all(finite):
            # Rows of requests that are over, aborted or ended by the token before, may hold anything.
            for row, sequence in enumerate(flight.sequences):
                if not finite[row] and sequence.id in self._live:
                    raise not_finite(row, len(tokens))
        for sequence, token in zip(flight.sequences, tokens, strict=True):
            if sequence.id not in self._live:
                continue
            sequence.append(token)
            events.append(TokenEvent(sequence.id, token, sequence.finish_reason))
            if sequence.finish_reason is not None:
                ended.append(sequence)
                self._end(sequence.id)
                # The step launched meanwhile has fed this token back for nothing.
                self._decode_tokens -= sequence.num_tokens - len(sequence.prompt) - len(sequence.output)
        self._tokens += len(events)
        return events, ended

    def _all_logits(self, chunks: list[Chunk]) -> torch.Tensor:
        logits = self.vocabulary.whole(self._runner.run(chunks, all_rows=True))
        self._count(chunks)
        return logits

    def _count(self, chunks: list[Chunk]) -> None:
        """Take chunks as computed once they are launched: what reads their results is launched later."""
        decoded = prefilled = 0
        for sequence, start, length, _ in chunks:
            if length == 1 and start >= len(sequence.prompt):
                decoded += 1
            else:
                prefilled += length
            sequence.num_computed += length
        self._steps += 1
        self._decode_tokens += decoded
        self._prefill_tokens += prefilled

    def _validate_room(self, num_tokens: int, name: str = "the request") -> None:
        needed = self.pool.blocks_for(num_tokens)
        if needed > self.pool.num_blocks:
            raise InvalidRequestError(
                f"{name} needs {needed} blocks of the KV cache for {num_tokens} tokens, but the pool has "
                f"{self.pool.num_blocks}: shorten it or compile with a larger kv_cache.max_tokens"
            )
