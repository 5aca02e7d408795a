"""The text that the language model learns: words of any files, by default of licences."""

from __future__ import annotations

import collections
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

LICENCES = Path("/usr/share/common-licenses")
UNKNOWN, END_OF_PARAGRAPH = "<unk>", "<eop>"


class Text(NamedTuple):
    """Words as int32 numbers, and what they stand for."""

    train: np.ndarray
    validation: np.ndarray
    vocabulary: list[str]


def load(paths: Sequence[Path]) -> Text:
    """Reads text files; every tenth paragraph is kept back for validation.

    Args:
        paths: The files. Without any they are the licences that Debian installs, or else the
            licence and the sources of this Python.
    """
    files = list(paths) or licences() or sources()
    paragraphs = [
        words_of(paragraph)
        for file in files
        for paragraph in re.split(r"\n\s*\n", file.read_text(errors="replace"))
    ]
    train = [word for i, words in enumerate(paragraphs) if i % 10 != 9 for word in words]
    validation = [word for words in paragraphs[9::10] for word in words]
    # A word that is there once tells nothing about where it may stand.
    counts = collections.Counter(train)
    vocabulary = [UNKNOWN, *sorted(word for word, count in counts.items() if count > 1)]
    numbers = {word: number for number, word in enumerate(vocabulary)}
    known = [np.array([numbers.get(w, 0) for w in part], np.int32) for part in (train, validation)]
    return Text(*known, vocabulary)


def licences() -> list[Path]:
    # Some are there under two names.
    return sorted({path.resolve() for path in LICENCES.glob("*")})


def sources() -> list[Path]:
    return sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py"))


def words_of(paragraph: str) -> list[str]:
    words = re.findall(r"[a-z]+|\d+|[^\sa-z\d]", paragraph.lower())
    return [*words, END_OF_PARAGRAPH] if words else []
