"""The interface of a result: one Arrow table, and everything else follows from it."""

from __future__ import annotations

import importlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from per_instance_accountant.errors import MissingDependencyError
from per_instance_accountant.results.files import csv_bytes, write_private
from per_instance_accountant.results.markup import element
from per_instance_accountant.results.views import view

if TYPE_CHECKING:
    import pyarrow as pa


class Tabular(ABC):
    """A frozen result of which every row is one instance. Rows are as private as the training data."""

    __slots__ = ()

    @abstractmethod
    def to_arrow(self) -> pa.Table:
        """One row per instance."""

    @abstractmethod
    def _summary(self) -> Mapping[str, str]:
        """Title first, then name -> text: what a notebook shows. No individual values."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """The Arrow PyCapsule stream, for any library that reads it (polars, duckdb, pandas, ...)."""
        return self.to_arrow().__arrow_c_stream__(requested_schema)

    def to_pandas(self) -> Any:
        """The table as a pandas DataFrame. Raises MissingDependencyError PIA061 without pandas."""
        _needed("pandas")
        return self.to_arrow().to_pandas()

    def to_polars(self) -> Any:
        """The table as a polars DataFrame. Raises MissingDependencyError PIA061 without polars."""
        return _needed("polars").from_arrow(self.to_arrow())

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the table as an owner-only Parquet file. Raises UsageError PIA070 for a path refused."""
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        pq.write_table(self.to_arrow(), sink, compression="zstd")
        write_private(path, sink.getvalue())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table as an owner-only CSV file; text cells that a spreadsheet would run are quoted.
        Raises UsageError PIA070 for a path refused."""
        table = self.to_arrow()
        rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
        write_private(path, csv_bytes(table.column_names, rows))

    def plot(self) -> Any:
        """A matplotlib Figure of the result, to restyle or save; a notebook draws it after
        ``%matplotlib inline``. Raises MissingDependencyError PIA061 without matplotlib."""
        return view("figure")(self)

    def _repr_html_(self) -> str:
        """A table without scripts or styles, which untrusted notebooks show as well."""
        (title, first), *rest = self._summary().items()
        rows = [
            element("tr", element("th", name, scope="row"), element("td", text))
            for name, text in [(title, first), *rest]
        ]
        return element("table", element("caption", type(self).__name__), element("tbody", *rows))


def _needed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "PIA061",
            f"{module} is not installed",
            "The same rows are in to_arrow(), which needs nothing more",
            f"pip install {module}",
        ) from error
