"""How a plan is printed: tables of plain text."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def print_table(console: "Console", title: str, header: list[str], rows: list[list[str]]) -> None:
    """A table of plain text: words on the left, numbers to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)


def print_notes(console: "Console", lines: list[str]) -> None:
    """Lines of text, as they are, and a blank one."""
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    console.print()


def amount(count: float) -> str:
    """A number of parameters in words; empty for a small one, which is read as it stands."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M" if count >= 1e4 else ""


def gigabytes(value: float) -> str:
    """Bytes as GB (10^9 bytes) with three digits; - for none."""
    if value == 0:
        return "-"
    size = value / 1e9
    num_decimals = next((number for number, least in enumerate((100, 10, 1)) if size >= least), 3)
    return f"{size:.{num_decimals}f}"
