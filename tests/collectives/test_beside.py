"""In which order things come to their end when a script does."""

from __future__ import annotations

from pathlib import Path

import fresh

SCRIPT = """
from smorms3_dist.collectives import beside, words
words._note_failures = lambda: None
words._leave = lambda: print("the others are told")
words._at_end(None)

class Told:
    def __init__(self, what):
        self.what = what

    def end(self):
        print(self.what)

begun, given_up = Told("begun"), Told("given up")
beside.end_after_words(given_up)
beside.end_with_script(begun)
"""


def test_what_holds_up_others_begins_before_they_are_told_and_is_given_up_after(
    tmp_path: Path,
) -> None:
    printed = fresh.passes(tmp_path, SCRIPT)
    assert printed.splitlines() == ["begun", "the others are told", "given up"]
