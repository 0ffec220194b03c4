"""Results that are read as a table: printed in columns, and as HTML in a notebook."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

Row = TypeVar("Row")


class Table(ABC, Generic[Row]):
    """A sequence of rows, each a named tuple, that `print` and notebooks show as a table.

    :ivar rows: In the order in which they are shown.
    """

    rows: Sequence[Row]

    @abstractmethod
    def _cells(self) -> Sequence[tuple[str, ...]]:
        """What is shown, the head first. The first column is set flush left, the others flush right."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *rows = [[html.escape(cell) for cell in row] for row in self._cells()]
        lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{body}</table>"
