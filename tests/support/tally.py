"""Faults injected and survived, by kind, in this process; `tests/conftest.py` adds up and tells them at the end."""

from __future__ import annotations

from collections import Counter

TALLY: Counter[str] = Counter()
