"""Shortens text from elsewhere to a line: the message of an exception may have megabytes."""

from __future__ import annotations


def shortened(text: str, most: int) -> str:
    """One line of at most `most` characters. A longer text keeps its start and its end, where the reason often is."""
    if len(text) > 4 * most:  # never split all of a huge one
        text = f"{text[: 2 * most]} {text[-2 * most :]}"
    line = " ".join(text.split())
    head = (most - 3) // 2
    return line if len(line) <= most else f"{line[:head]} … {line[head + 3 - most :]}"
