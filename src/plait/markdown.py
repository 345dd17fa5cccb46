"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False
) -> str:
    """A Markdown table, with its columns but the first flush right where they are numbers.

    Example:
        >>> print(markdown_table(["method", "score"], [["mine", "0.8"]], numbers=True))
        | method | score |
        | --- | ---: |
        | mine | 0.8 |
    """
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
