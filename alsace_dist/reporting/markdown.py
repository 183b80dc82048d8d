"""Tables and texts as Markdown."""

from alsace_dist.reporting.tables import Table


def escape(text: str) -> str:
    """A text that Markdown takes for nothing but text."""
    return "".join("\\" + character if character in r"\`*[]<>|&" else character for character in text)


def table(shown: Table) -> str:
    """A table, its strong rows in bold."""
    lines = [[escape(name) for name in shown.header]]
    lines.append(["---" if number in shown.words else "---:" for number in range(len(shown.header))])
    for row in shown.rows:
        mark = "**" if row.kind == "strong" else ""
        lines.append([f"{mark}{escape(cell)}{mark}" for cell in row.cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
