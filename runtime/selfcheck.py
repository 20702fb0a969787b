"""The checks that every compile makes: two sequences side by side give the logits of each alone, and of the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ir.errors import FuselineError, UnsupportedModelError
from .step import StepInput
from .yardstick import Expected

# Long enough that blocks are crossed and rows of the two sequences fall into one tile.
_LENGTHS = (21, 13)


Make = Callable[[], Callable[[StepInput], Tensor]]


def most_slots(block_size: int) -> int:
    """The cache slots that the checks need."""
    return sum(-(-length // block_size) * block_size for length in _LENGTHS)


def step_of(prompts: Sequence[Sequence[int]], block_size: int, device: torch.device) -> StepInput:
    """One step that prefills whole prompts side by side, each in blocks of its own, and asks for all rows."""
    tokens = [token for prompt in prompts for token in prompt]
    positions = [place for prompt in prompts for place in range(len(prompt))]
    counts = [-(-len(prompt) // block_size) for prompt in prompts]
    total = sum(counts)
    # Blocks in reverse order, so that a kernel that ignores the block table is caught.
    order = list(range(total))[::-1]
    tables, slots = [], []
    for prompt, count in zip(prompts, counts):
        mine, order = order[:count], order[count:]
        tables.append(mine + [0] * (max(counts) - count))
        slots += [mine[place // block_size] * block_size + place % block_size for place in range(len(prompt))]
    starts = [0]
    for prompt in prompts:
        starts.append(starts[-1] + len(prompt))

    def long(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def short(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return StepInput(
        tokens=long(tokens),
        positions=long(positions),
        slots=long(slots),
        query_starts=short(starts),
        context_lens=short([len(prompt) for prompt in prompts]),
        block_tables=short(tables),
        rows=long(range(len(tokens))),
    )


def _logits(make: Make, step: StepInput) -> Tensor:
    try:
        return make()(step).float()
    except FuselineError:
        raise
    except Exception as error:  # an operator that accepted the types but not the values
        raise UnsupportedModelError(
            f"the compiled graph cannot be run on {len(step.tokens)} tokens: {type(error).__name__}: {error}"
        ) from error


def check_concatenation(
    make: Make,
    vocab_size: int,
    block_size: int,
    device: torch.device,
    tolerance: float,
    exact: bool,
    max_length: int,
) -> float:
    """Run two random sequences concatenated and each alone; returns the largest relative RMSE of a row of logits
    (with ``exact=False``, for rounded types, of the middle row of each sequence).

    ``make()`` gives the model on a fresh cache of ``most_slots``. It may be the few layers that a folded graph states:
    they are all of the model that differ, with weights of their own.

    Raises:
        UnsupportedModelError: they differ by more than ``tolerance``: something but attention mixes tokens.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, max_length) for length in _LENGTHS]
    prompts = [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]
    together = torch.split(_logits(make, step_of(prompts, block_size, device)), lengths)
    worst = 0.0
    for index, prompt in enumerate(prompts):
        alone = make()(step_of([prompt], block_size, device)).float()
        # Rounding may send a token to another expert and change its row whole, so rows are compared one by one and the
        # middle one counts; what mixes sequences changes most rows of the second.
        rows = (together[index] - alone).norm(dim=-1) / alone.norm(dim=-1).clamp_min(1e-30)
        error = float(rows.max() if exact else rows.median())
        worst = max(worst, error if error == error else float("inf"))
    if not worst <= tolerance:
        raise UnsupportedModelError(
            f"two concatenated sequences give other logits than each alone (relative RMSE {worst:.1e}, allowed {tolerance:.0e}): "
            "some operator mixes tokens of different sequences, so batching would give wrong answers"
        )
    return worst


def check_source(
    make: Make,
    expected: Sequence[Expected],
    block_size: int,
    device: torch.device,
    tolerance: float,
) -> float:
    """Compare with the logits of the model itself, prompt by prompt; returns the largest relative RMSE.

    A prompt with a neighbour is run in one step with it, behind it: what leaks from one to the other shows here, too.
    In fp32 whole prompts are compared. In narrower types rounding may send a token to another expert, so there the
    middle one of a prompt's rows counts.

    Raises:
        UnsupportedModelError: they differ by more than ``tolerance``: the model does something that its graph does not.
    """
    worst = 0.0
    for item in expected:
        prompt, theirs = item.prompt, item.logits
        prompts = [item.neighbour, prompt] if item.neighbour else [prompt]
        ours = _logits(make, step_of(prompts, block_size, device))[-len(prompt) :]
        exact = tolerance < 1e-3
        difference = (ours.cpu() - theirs).reshape(1 if exact else len(prompt), -1)
        sizes = theirs.reshape(difference.shape).norm(dim=-1).clamp_min(1e-30)
        error = float((difference.norm(dim=-1) / sizes).median())
        if not error <= tolerance:
            raise UnsupportedModelError(
                f"the compiled model and the model itself give other logits for a prompt of {len(prompt)} tokens (relative "
                f"RMSE {error:.1e}, allowed {tolerance:.0e}): the model's forward does something that its trace does not "
                "show, such as another branch for one token, positions of its own or attention of its own"
            )
        worst = max(worst, error)
    return worst
