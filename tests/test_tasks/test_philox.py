"""Philox against the known answers of its authors, and masks that depend on nothing but their key."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from mergepipe.tasks.philox import drop_random, mask_key, words


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        (0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),  # kat_vectors of Random123
        (0x299F31D0A4093822, 3, None),
    ],
)
def test_known_answers(key: int, counter: int, expected: list[int] | None) -> None:
    out = np.empty(4, np.uint32)
    words(np.uint64(key), 4 * counter, out)
    assert out.tolist() == (expected or philox(key, counter))


def philox(key: int, counter: int) -> list[int]:
    """Ten rounds on Python integers."""
    a, b, c, d, k, m = counter & 0xFFFFFFFF, counter >> 32, 0, 0, key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ k, right & 0xFFFFFFFF, (left >> 32) ^ d ^ m, left & 0xFFFFFFFF
        k, m = (k + 0x9E3779B9) & 0xFFFFFFFF, (m + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def test_element_beyond_four_billion_counters() -> None:
    out = np.empty(8, np.uint32)
    words(np.uint64(5), 4 * (2**32 - 1), out)
    assert out.tolist() == philox(5, 2**32 - 1) + philox(5, 2**32)


def test_key_is_a_hash_of_seed_position_and_name() -> None:
    digest = hashlib.sha256(b"42\x001\x00lm_head.weight").digest()
    assert mask_key(42, 1, "lm_head.weight") == int.from_bytes(digest[:8], "little")


def test_mask_does_not_depend_on_the_cut() -> None:
    key, limit = np.uint64(mask_key(1, 0, "x")), int(0.3 * 2**32)
    whole = np.ones(1000, np.float32)
    drop_random(whole, key, 0, limit)
    drawn = np.empty(1000, np.uint32)
    words(key, 0, drawn)
    np.testing.assert_array_equal(whole, drawn < limit)
    assert 0.25 < whole.mean() < 0.35
    for cut in (1, 2, 3, 4, 5, 501, 998):
        pieces = [np.ones(cut, np.float32), np.ones(1000 - cut, np.float32)]
        drop_random(pieces[0], key, 0, limit)
        drop_random(pieces[1], key, cut, limit)
        np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize(("limit", "kept"), [(0, 0.0), (2**32, 1.0)])
def test_all_or_nothing(limit: int, kept: float) -> None:
    values = np.ones(1000, np.float64)
    drop_random(values, np.uint64(3), 0, limit)
    assert values.mean() == kept
