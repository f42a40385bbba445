"""Draws by key: equal keys repeat, different keys do not, and an epoch visits everything once."""

from __future__ import annotations

import hashlib

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wan_distill.maths.randomness import keyed_noise, keyed_order, keyed_seed

quick = settings(max_examples=60, deadline=None)
lines = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=40)
keys = st.lists(st.one_of(st.integers(), lines), min_size=1, max_size=4)


@quick
@given(keys, keys)
def test_seeds_tell_keys_apart_and_repeat_for_equal_ones(a, b):
    assert keyed_seed(*a) == keyed_seed(*a) and 0 <= keyed_seed(*a) < 2**63
    assume(a != b)
    assert keyed_seed(*a) != keyed_seed(*b)


def test_a_seed_is_the_hash_of_its_key_as_json():
    """Resumed runs and stored samples depend on it: it may never change."""
    digest = hashlib.sha256(b'[7, "dmd", 3]').digest()
    assert keyed_seed(7, "dmd", 3) == int.from_bytes(digest[:8], "little") // 2


def test_noise_depends_on_its_key_alone():
    first = keyed_noise((4, 2, 3, 3), 0, "dmd", 1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = keyed_noise((4, 2, 3, 3), 0, "dmd", 1)
    assert torch.equal(first, again) and first.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)  # and draws nothing from the global generator
    assert not torch.equal(first, keyed_noise((4, 2, 3, 3), 0, "dmd", 2))


@quick
@given(st.integers(1, 50), st.integers(0, 5), st.integers())
def test_an_epoch_visits_everything_once(size, epoch, seed):
    visited = [keyed_order(seed, position=epoch * size + i, size=size) for i in range(size)]
    assert sorted(visited) == list(range(size))


def test_each_epoch_and_each_key_has_its_own_order():
    orders = [
        tuple(keyed_order(*key, position=50 * epoch + i, size=50) for i in range(50))
        for key in ((0, "x0"), (0, "pairs"), (1, "x0"))
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == len(orders)
