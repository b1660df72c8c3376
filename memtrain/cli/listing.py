"""Text of a corpus on the terminal, and a bar while it is gone through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from memtrain.data.escaping import printable

LISTED = 20  # faults, failures and groups on the terminal


def print_some(lines: Sequence[str], rest: str, total: int | None = None) -> None:
    """The first of these lines, and how many more there are, of `total` where these are not all."""
    total = len(lines) if total is None else total
    for line in lines[:LISTED]:
        print(f"  {line}")
    if total > LISTED:
        print(f"  … and {total - LISTED} more, {rest}")


def shown(text: str, limit: int = 200) -> str:
    """Text from a corpus, safe on a terminal: what is not printable is escaped, what is long is cut."""
    return printable(text if len(text) <= limit else f"{text[: limit - 1]}…")


def progress_bar(description: str) -> Callable[[Iterable, int], Iterable]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not console.is_terminal
    return lambda items, total: track(items, description, total, console=console, disable=hidden)
