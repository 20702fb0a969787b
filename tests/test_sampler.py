"""Sampling: what may be drawn, how often, and that nothing but seed, index and the row itself decides it."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.ir.errors import InvalidRequestError, VerificationError
from fuseline.runtime.sampler import _draw, _first_above, _knobs, _weights, sample
from fuseline.runtime.sequence import SamplingParams


def draw_many(row, params, count):
    """``count`` draws from one row: tokens 0, 1, ... of one request."""
    return sample(row.expand(count, -1), [params] * count, list(range(count)))


def allowed(logits, temperature, top_k, top_p):
    """Tokens that may be drawn, by the definition: sort, cut at k, cut where the probabilities reach p."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[: top_k or len(order)]
    weights = np.exp((np.array([logits[token] for token in order]) - max(logits)) / temperature)
    reached = np.cumsum(weights) / weights.sum()
    count = 1
    while top_p is not None and count < len(order) and reached[count - 1] < top_p - 1e-9:
        count += 1
    return set(order[: count if top_p is not None else len(order)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_temperature_zero_takes_the_first_maximum(dtype):
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [5.0, 5.0, 5.0, 5.0], [-3.0, -2.0, -1.0, -0.5]], dtype=dtype)
    params = [SamplingParams(), SamplingParams(top_k=2, top_p=0.1, seed=1), SamplingParams(temperature=-0.0)]
    assert sample(logits, params, [0, 7, 9]) == [1, 0, 3]


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-3, 3), min_size=1, max_size=9),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 10),
    top_p=st.none() | st.floats(0.01, 1.0),
    seed=st.integers(0, 2**64 - 1),
)
def test_only_allowed_tokens_are_drawn(logits, temperature, top_k, top_p, seed):
    """Small integer logits are full of ties, where a cut is easily off by one."""
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    drawn = draw_many(torch.tensor(logits, dtype=torch.float32), params, 40)
    assert set(drawn) <= allowed(logits, temperature, top_k, top_p)


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({"top_k": 1}, {2}),
        ({"top_k": 3}, {2, 3, 0}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 1e-9}, {2}),
        ({"top_p": 0.5}, {2, 3}),
        ({"top_p": 0.51}, {2, 3, 0}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        # top-k first: of the two left, each has half.
        ({"top_k": 2, "top_p": 0.5}, {2}),
        ({"top_k": 2, "top_p": 0.51}, {2, 3}),
    ],
)
def test_all_allowed_tokens_are_drawn(cut, expected):
    """Probabilities 1/6 1/6 1/4 1/4 1/6: the smallest set that reaches p, lower ids first among equals."""
    row = torch.log(torch.tensor([2.0, 2.0, 3.0, 3.0, 2.0], dtype=torch.float64))
    assert set(draw_many(row, SamplingParams(temperature=1.0, seed=5, **cut), 200)) == expected


@pytest.mark.parametrize("cut", [{}, {"top_k": 4}, {"top_p": 0.9}])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_follow_the_probabilities(cut, temperature):
    """2000 draws: each frequency within five standard deviations of softmax(logits / temperature) on what is kept."""
    logits = [0.5, -1.0, 2.0, 1.5, 0.0, -4.0]
    count = 2000
    params = SamplingParams(temperature=temperature, seed=11, **cut)
    drawn = draw_many(torch.tensor(logits), params, count)
    kept = allowed(logits, temperature, params.top_k, params.top_p)
    weights = np.array([math.exp(value / temperature) if token in kept else 0.0 for token, value in enumerate(logits)])
    expected = weights / weights.sum()
    seen = np.bincount(drawn, minlength=len(logits)) / count
    assert np.all(np.abs(seen - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [{}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.9}])
def test_a_draw_does_not_depend_on_the_batch(dtype, cut):
    """The same rows alone, in any order, and as slices of a wider tensor at odd addresses: the same tokens."""
    generator = torch.Generator().manual_seed(3)
    rows, vocab = 12, 1009
    logits = torch.randn(rows, vocab, generator=generator).to(dtype)
    params = [SamplingParams(temperature=0.7 + row / 10, seed=row % 3, **cut) for row in range(rows)]
    params[4] = SamplingParams()
    indices = [row * 5 % 7 for row in range(rows)]
    batched = sample(logits, params, indices)
    alone = [sample(logits[row : row + 1].clone(), [params[row]], [indices[row]])[0] for row in range(rows)]
    order = [7, 0, 11, 4, 3, 9, 1, 10, 2, 8, 6, 5]
    mixed = sample(logits[order], [params[row] for row in order], [indices[row] for row in order])
    wide = torch.zeros(rows, vocab + 3, dtype=dtype)
    wide[:, 1:-2] = logits
    assert alone == batched
    assert mixed == [batched[row] for row in order]
    assert sample(wide[:, 1:-2], params, indices) == batched
    assert len(set(batched)) > 3


def test_rows_drawn_together_are_drawn_as_alone():
    """An accelerator draws many rows at once: cuts at different k and p must not leak from row to row."""
    cuts = [{}, {"top_k": 3}, {"top_k": 700, "top_p": 0.8}, {"top_p": 0.6}, {"top_k": 40, "top_p": 0.99}]
    logits = torch.randn(20, 1009, generator=torch.Generator().manual_seed(8))
    params = [SamplingParams(temperature=0.5 + row / 10, seed=row, **cuts[row % 5]) for row in range(20)]
    together = _draw(logits, [_knobs(param, 0, 1009) for param in params])
    assert together.tolist() == sample(logits, params, [0] * 20)


def test_seed_and_index_both_decide():
    """Equal seeds repeat, other seeds and other indices differ; no seed differs from call to call."""
    row = torch.zeros(30_011)
    params = SamplingParams(temperature=1.0, seed=42)
    first = draw_many(row, params, 16)
    assert first == draw_many(row, params, 16)
    assert len(set(first)) == 16
    for seed in (43, 2**64 - 1):
        assert not set(first) & set(draw_many(row, dataclasses.replace(params, seed=seed), 16))
    unseeded = dataclasses.replace(params, seed=None)
    # One of them may be there by chance, which is so once in a hundred times; three are once in ten million.
    assert len(set(first) & set(draw_many(row, unseeded, 16))) < 3
    assert draw_many(row, unseeded, 4) != draw_many(row, unseeded, 4)


def test_seeds_mean_the_same_in_every_release():
    """Users record seeds: these tokens follow from the published Philox 4x64 generator and must never change."""
    params = SamplingParams(temperature=1.0, seed=7)
    uniforms = [int(np.random.Philox(key=7, counter=index).random_raw()) / 2**64 for index in range(5)]
    assert draw_many(torch.zeros(1000), params, 5) == [math.floor(uniform * 1000) for uniform in uniforms]
    assert draw_many(torch.zeros(1000), params, 5) == PINNED


PINNED = [872, 82, 14, 442, 61]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-9])
def test_tiny_temperatures_are_greedy_not_overflow(temperature):
    row = torch.tensor([1.0, 9.0, 8.0, -300.0])
    assert set(draw_many(row, SamplingParams(temperature=temperature, top_p=0.9, seed=0), 8)) == {1}


def test_unlikely_tokens_keep_their_share_of_a_large_vocabulary():
    """One token at 1/2 and 30,000 that share the rest: rounding must not lose the tail."""
    row = torch.zeros(30_001)
    row[0] = math.log(30_000)
    drawn = draw_many(row, SamplingParams(temperature=1.0, seed=1), 200)
    assert 70 < drawn.count(0) < 130
    assert len(set(drawn)) > 60


def test_integer_weights_are_fine_and_never_overflow():
    """A millionth of the most likely token still has its share to 1 in 1000, whatever the size of the vocabulary."""
    for vocab in (2, 1024, 128_256, 2**20):
        likely, rare = _weights(torch.tensor([0.0, -13.8]), torch.zeros(1), torch.ones(1), vocab).tolist()
        assert likely * vocab <= 2**52
        assert rare / likely == pytest.approx(math.exp(-13.8), rel=1e-3)


def test_the_ends_of_the_range_fall_on_tokens_that_can_be_drawn():
    """Draws from 0 up to the sum less one, on weights 0 5 0 4: never a token of weight 0. Garbage stays in range."""
    sums = torch.tensor([[0, 5, 5, 9]]).repeat(10, 1)
    assert _first_above(sums, torch.arange(10)[:, None]).tolist() == [1] * 5 + [3] * 5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=0),
        SamplingParams(temperature=1.0, top_k=3, top_p=0.5, seed=0),
    ],
)
def test_logits_that_are_not_finite_are_an_error(value, dtype, params):
    """Else one NaN becomes a plausible token, and a broken kernel goes unseen."""
    logits = torch.randn(3, 65, dtype=torch.float32).to(dtype)
    logits[1, 40] = value
    with pytest.raises(VerificationError, match="row 1 of 3"):
        sample(logits, [params] * 3, [0, 0, 0])


def test_rows_and_params_must_match():
    with pytest.raises(ValueError, match="2 rows of logits for 1 params"):
        sample(torch.zeros(2, 4), [SamplingParams()], [0])
    assert sample(torch.zeros(0, 4), [], []) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("max_new_tokens", value) for value in (0, -1, 1.5, True, "8", None)],
        *[("temperature", value) for value in (-0.1, math.nan, math.inf, True, "1", None)],
        *[("top_k", value) for value in (0, -3, 1.5, True, "1")],
        *[("top_p", value) for value in (0, 0.0, -0.5, 1.1, math.nan, True, "1")],
        *[("seed", value) for value in (-1, 2**64, 1.0, False, "1")],
        *[("stop_token_ids", value) for value in (3, None, [3], (1, "2"), (True,), (-1,), "12")],
    ],
)
def test_bad_parameters_are_refused_by_name(name, value):
    with pytest.raises(InvalidRequestError, match=rf"SamplingParams\.{name} is .*: pass "):
        SamplingParams(**{name: value}).validate()


def test_good_parameters_pass():
    SamplingParams().validate()
    SamplingParams(1, 1, 1, 1, 0, (0, 5)).validate()
    SamplingParams(10, 0.5, 50, 0.9, 2**64 - 1, (1,)).validate()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("vocab", [50_257, 128_256])
def test_a_gpu_draws_the_same_tokens(vocab):
    """Integer sums and ties by id make a draw a function of the logits: not of the device, nor of the rows with it."""
    rows = 96
    cuts = [{}, {"top_k": 40}, {"top_k": 7, "top_p": 0.8}, {"top_p": 0.9}, {"top_k": 100, "top_p": 0.5}]
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)).bfloat16()
    params = [SamplingParams(temperature=0.5 + row / 50, seed=row, **cuts[row % 5]) for row in range(rows)]
    params[3] = params[50] = SamplingParams()
    indices = list(range(rows))
    expected = sample(logits, params, indices)
    there = logits.cuda()
    for _ in range(3):
        assert sample(there, params, indices) == expected
    alone = [sample(there[row : row + 1].clone(), [params[row]], [row])[0] for row in range(rows)]
    assert alone == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_waited_for_once():
    """Each wait in the middle of sampling would leave the device idle while the host catches up."""
    cuts = [{}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.9}]
    params = [SamplingParams(temperature=0.9, seed=row, **cuts[row % 4]) for row in range(8)]
    logits = torch.randn(8, 1000, device="cuda")
    sample(logits, params, [0] * 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            sample(logits, params, [0] * 8)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([item for item in caught if "synchronizing CUDA operation" in str(item.message)]) == 1
