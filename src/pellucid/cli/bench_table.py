"""Rows of a benchmark as they are measured: a table, Markdown, CSV, JSON, or JSON line by line.

A row is printed when it is measured, so that an interrupted run keeps its rows. The table ends
with one line of JSON, which holds all rows; `json` is that line alone.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from .terminal import one_line, text_width

__all__ = ["FORMATS", "RowPrinter"]

FORMATS = ("table", "md", "csv", "json", "jsonl")


class RowPrinter:
    """Prints the rows of one run in one format."""

    def __init__(self, bench: str, form: str, columns: Sequence[tuple[str, int]]) -> None:
        """`columns`: titles, and the widths that cells will need, because later rows are not known
        yet.
        """
        self._bench, self._form = bench, form
        self._header = [title for title, _ in columns]
        self._widths = [max(width, text_width(title)) for title, width in columns]
        self._records: list[Mapping[str, Any]] = []

    def note(self, text: str) -> None:
        """A line beside the table; the formats for programs leave it out."""
        if self._form in ("table", "md"):
            click.echo(one_line(text))

    def row(self, cells: Sequence[str], record: Mapping[str, Any]) -> None:
        """Print a row: `cells` of the table, or `record` for programs (in CSV flat values only)."""
        is_first = not self._records
        self._records.append(record)
        if self._form in ("table", "md"):
            if is_first:
                self._print_header()
            self._print_cells(cells)
        elif self._form == "jsonl":
            click.echo(json.dumps(record))
        elif self._form == "csv":
            flat = {k: v for k, v in record.items() if not isinstance(v, list | tuple | dict)}
            if is_first:
                click.echo(_csv_line(list(flat)))
            click.echo(_csv_line(list(flat.values())))

    def end(self, **about: Any) -> None:
        """The last line: all rows as one JSON object, with what is said about the whole run. A run
        that failed before its first row has none.
        """
        if self._records and self._form in ("table", "json"):
            click.echo(json.dumps({"bench": self._bench, **about, "results": self._records}))

    def _print_header(self) -> None:
        self._print_cells(self._header)
        click.echo(f"|{'|'.join('-' * (w + 2) for w in self._widths)}|")

    def _print_cells(self, cells: Sequence[str]) -> None:
        shown = [one_line(cell) for cell in cells]
        padded = [
            " " * (w - text_width(c)) + c if c[:1].isdigit() else c + " " * (w - text_width(c))
            for c, w in zip(shown, self._widths, strict=True)
        ]
        click.echo(f"| {' | '.join(padded)} |")


def _csv_line(values: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(["" if v is None else v for v in values])
    return line.getvalue()
