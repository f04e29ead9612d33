"""The columns of tables that hold the fields of a text, and the texts in batches of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from llama_ray.data.records.fields import WAY_OUT, Fields
from llama_ray.data.records.reading import Reading, Text
from llama_ray.data.records.text import NotTextError, text_of_bytes, text_of_record
from llama_ray.data.sources.blocks import DamagedError
from llama_ray.data.sources.files import File, SourceError
from llama_ray.data.sources.left_out import TOO_LONG
from llama_ray.utils.errors import first_line, printable

if TYPE_CHECKING:
    # pyarrow is imported at its first use, because models train and generate on machines that lack it.
    import pyarrow

_SHOWN_COLUMNS = 20
_SLICE_ROWS = 1024


def missing_column(file: File, name: str, columns: Sequence[str]) -> SourceError:
    """Return the error for a table that lacks a column, or has two of that name."""
    problem = "two columns" if name in columns else "no column"
    return SourceError(
        f"{printable(file.name)} has {problem} {printable(name)!r}; its columns are {_listed(columns)}; {WAY_OUT}"
    )


def check_columns(file: File, schema: pyarrow.Schema, fields: Fields) -> None:
    """Raise SourceError, which names the columns of a table, if it lacks a field or has other than text in it.

    Where no field is required, it must have one of them.
    """
    import pyarrow as pa

    if not fields.required:
        if not set(fields.names) & set(schema.names):
            raise SourceError(
                f"{printable(file.name)} has none of the columns {', '.join(fields.names)}; its columns are "
                f"{_listed(schema.names)}; rename them"
            )
        return
    for name in fields.names:
        kind: pyarrow.DataType = pa.struct(list(schema))
        for part in _path(schema, name):
            if not pa.types.is_struct(kind) or len(kind.get_all_field_indices(part)) != 1:
                raise missing_column(file, name, schema.names)
            kind = kind.field(part).type
        if not _is_text(kind):
            raise SourceError(
                f"{printable(file.name)} has {printable(str(kind))} in its column {printable(name)!r}, which must be "
                f"text; {WAY_OUT}"
            )


def top_columns(schema: pyarrow.Schema, fields: Fields) -> list[str]:
    """Return the columns of a table that hold the fields, each once."""
    if not fields.required:
        return [name for name in schema.names if name in fields.names]
    return list(dict.fromkeys(_path(schema, name)[0] for name in fields.names))


def texts_of_batch(reading: Reading, batch: pyarrow.RecordBatch, first: int) -> Iterator[Text]:
    """Yield the texts of a batch of rows, the first of which is row `first` of its file, counted from 0.

    Raises DamagedError for a batch that cannot be.
    """
    rows = _values_of(reading.fields, batch) if reading.fields.required else _records_of(batch)
    for number, row in enumerate(rows, first):
        try:
            yield Text(_text(reading, row), number, row_place(number))
        except NotTextError as error:
            reading.bad(error.reason, row_place(number), detail=error.detail)


def row_place(number: int) -> str:
    """Return how a message names row `number`, which is counted from 0."""
    return f" row {number + 1}"


def _listed(columns: Sequence[str]) -> str:
    more = ", ..." if len(columns) > _SHOWN_COLUMNS else ""
    return printable(", ".join(map(repr, columns[:_SHOWN_COLUMNS])) + more, 1000)


def _text(reading: Reading, row: Mapping[str, object]) -> str:
    text = text_of_record(
        {name: text_of_bytes(value) if isinstance(value, bytes) else value for name, value in row.items()},
        reading.fields,
    )
    if len(text) > reading.max_record_bytes:
        raise NotTextError(TOO_LONG)
    return text


def _values_of(fields: Fields, batch: pyarrow.RecordBatch) -> Iterator[dict[str, object]]:
    """Yield the fields of each row, which are text. Raises DamagedError."""
    arrays = [_array(batch, name) for name in fields.names]
    for start in range(0, batch.num_rows, _SLICE_ROWS):
        for values in zip(*(_values(array.slice(start, _SLICE_ROWS)) for array in arrays), strict=True):
            yield dict(zip(fields.names, values, strict=True))


def _records_of(batch: pyarrow.RecordBatch) -> Iterator[dict[str, object]]:
    """Yield each row, without the fields that only other rows have: Arrow fills them with null. Raises DamagedError."""
    import pyarrow as pa

    try:
        batch.validate(full=True)
    except (pa.ArrowException, IndexError) as error:
        raise DamagedError(f"rows that are damaged ({first_line(error)})") from error
    for start in range(0, batch.num_rows, _SLICE_ROWS):
        for row in batch.slice(start, _SLICE_ROWS).to_pylist():
            yield {name: _without_null(value) for name, value in row.items() if value is not None}


def _without_null(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_null(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_null(part) for part in value]
    return value


def _path(schema: pyarrow.Schema, name: str) -> list[str]:
    """Return the names of the column and of the fields in it; a name with dots may be that of one column."""
    return [name] if name in schema.names else name.split(".")


def _array(batch: pyarrow.RecordBatch, name: str) -> pyarrow.Array:
    """Return a field of all rows, checked so that no value lies outside of its memory. Raises DamagedError."""
    import pyarrow as pa
    from pyarrow import compute

    column, *parts = _path(batch.schema, name)
    array = batch.column(column)
    try:
        array.validate()
        for part in parts:
            array = compute.struct_field(array, part)
        if pa.types.is_dictionary(array.type):
            array.validate(full=True)
            array = array.dictionary_decode()
        # As bytes: whether they are UTF-8 is checked value by value.
        _bytes(array).validate(full=True)
    except (pa.ArrowException, IndexError) as error:
        raise DamagedError(f"rows that are damaged ({first_line(error)})") from error
    return array


def _values(array: pyarrow.Array) -> list[object]:
    """Return the values; bytes where not all are UTF-8."""
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        return list(_bytes(array).to_pylist())


def _bytes(array: pyarrow.Array) -> pyarrow.Array:
    import pyarrow as pa

    kinds = {
        pa.string(): pa.binary(),
        pa.large_string(): pa.large_binary(),
        pa.string_view(): pa.binary_view(),
    }
    return array.view(kinds[array.type]) if array.type in kinds else array


def _is_text(kind: pyarrow.DataType) -> bool:
    """Whether values of this type may be text: strings, bytes, and nulls, which are told row by row."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    checks = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
        types.is_null,
    )
    return any(check(kind) for check in checks)
