"""What is said of an input: single things up to a number of them, and how many of each kind."""

from __future__ import annotations

from collections.abc import Callable

MOST_NAMED = 20  # duplicates, and long prompts, that are named one by one


class Remarks:
    """Says what is to be known of single entries, and at the end how many of each kind there were.

    Args:
        flag: the setting that names the input; every line begins with it.
        source: the input.
        say: gets each line.
    """

    def __init__(self, flag: str, source: str, say: Callable[[str], None]):
        self.flag = flag
        self.source = source
        self.say = say
        self.places: dict[str, list[str]] = {}
        self.named: dict[str, int] = {}

    def name(self, kind: str, where: str, remark: str) -> None:
        """One entry's line, for the first of a kind."""
        self.named[kind] = self.named.get(kind, 0) + 1
        if self.named[kind] <= MOST_NAMED:
            self.say(f"{self.flag} {where}: {remark}")

    def count(self, kind: str, where: str) -> None:
        """One more of a kind that is only counted."""
        self.places.setdefault(kind, []).append(where)

    def sum_up(self) -> None:
        """The counts."""
        for kind, places in self.places.items():
            self.say(f"{self.flag} {self.source}: {len(places)} {kind} (the first: {places[0]})")
        for kind, number in self.named.items():
            if number > MOST_NAMED:
                self.say(
                    f"{self.flag} {self.source}: {number} {kind}, of which {MOST_NAMED} are named"
                )
