"""The table of what composes with what, in Markdown, as README and docs/launch.md hold it."""

from __future__ import annotations

from string import ascii_lowercase

from launch.compose import FEATURES, cell

BEGIN, END = "<!-- made by python -m launch.compose_table -->", "<!-- end of the table -->"


def markdown() -> str:
    """Return the table and, below it, the reasons of what is refused; between BEGIN and END."""
    names = list(FEATURES)
    reasons: dict[str, str] = {}
    rows = []
    for row in names:
        cells = [_shown(row, column, reasons) for column in names]
        rows.append(f"| {names.index(row) + 1} {FEATURES[row].label} | {' | '.join(cells)} |")
    numbers = " | ".join(str(n + 1) for n in range(len(names)))
    lines = [BEGIN, f"| | {numbers} |", "|---" * (len(names) + 1) + "|", *rows, ""]
    lines += [f"- **{letter}**: {reason}" for reason, letter in reasons.items()]
    return "\n".join([*lines, END])


def replaced(text: str) -> str:
    """Return a document with its table made anew. Raises ValueError where it has none."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the document has no {BEGIN} ... {END}")
    return before + markdown() + after


def _shown(row: str, column: str, reasons: dict[str, str]) -> str:
    found = cell(row, column)
    if found is None:
        return ""
    if found.reason is None:
        return "✓"
    return reasons.setdefault(found.reason, ascii_lowercase[len(reasons)])


if __name__ == "__main__":
    print(markdown())
