"""Pairs of dates: as people write them, and as ISO 8601 does."""

from __future__ import annotations

import datetime

import numpy as np
from chainer.datasets import TupleDataset

FIRST, LAST = datetime.date(1970, 1, 1), datetime.date(2069, 12, 31)
FORMS = [
    "{d.day} {d:%B} {d.year}",
    "{d:%B} {d.day}, {d.year}",
    "{d:%A}, {d:%B} {d.day}{th}, {d.year}",
    "the {d.day}{th} of {d:%B}, {d.year}",
    "{d:%a} {d.day} {d:%b} {d.year}",
    "{d:%b} {d.day} '{d:%y}",
    "{d.day}.{d.month}.{d.year}",
    "{d:%m}/{d:%d}/{d:%y}",
    "{d.day}-{d:%b}-{d:%y}",
]
ALPHABET = "\0 ',-./0123456789abcdefghijklmnopqrstuvwxyz"
"""The characters by number; the first one fills up, and is what a decoder begins with."""

LONGEST = len("wednesday, september 30th, 2026")
ISO_LENGTH = len("2026-09-30")


def load(count: int, seed: int) -> tuple[TupleDataset, TupleDataset]:
    """Writes pairs of int32 arrays, of shapes (LONGEST,) and (ISO_LENGTH,).

    Args:
        count: How many to train on; to validate there are a tenth of that, of other days.
        seed: Of the choice of days and forms.
    """
    random = np.random.RandomState(seed)
    days = random.permutation((LAST - FIRST).days + 1)
    parts = []
    for some, size in ((days[len(days) // 10 :], count), (days[: len(days) // 10], count // 10)):
        dates = [FIRST + datetime.timedelta(int(day)) for day in random.choice(some, size)]
        forms = random.choice(FORMS, size)
        human = [write(date, form) for date, form in zip(dates, forms, strict=True)]
        parts.append(
            TupleDataset(
                np.stack([encode(text, LONGEST) for text in human]),
                np.stack([encode(date.isoformat(), ISO_LENGTH) for date in dates]),
            )
        )
    return parts[0], parts[1]


def write(date: datetime.date, form: str) -> str:
    th = "th"
    if date.day not in (11, 12, 13):
        th = ["th", "st", "nd", "rd", *["th"] * 6][date.day % 10]  # codespell:ignore
    return form.format(d=date, th=th).lower()


def encode(text: str, length: int) -> np.ndarray:
    return np.array([ALPHABET.index(char) for char in text.ljust(length, "\0")], np.int32)


def decode(numbers: np.ndarray) -> str:
    return "".join(ALPHABET[number] for number in numbers).rstrip("\0")
