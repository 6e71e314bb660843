"""Records from Parquet files and from folders saved by `datasets`; both need the optional package pyarrow."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from numprune.errors import InputError

STATE = "state.json"  # beside the data in a folder written by `Dataset.save_to_disk`
_SPLITS = "dataset_dict.json"  # written by `DatasetDict.save_to_disk` instead, with a folder for each split


def is_dataset(path: Path) -> bool:
    """Return whether a folder was written by `datasets`."""
    return (path / STATE).is_file() or (path / _SPLITS).is_file()


def rows(
    path: Path, fields: Sequence[str], needed: Sequence[str] = ("text", "messages", "codes")
) -> Iterator[dict[str, Any]]:
    """Yield each row of a Parquet file or saved dataset, with those of `fields` that it has, without nulls.

    `needed`: the table must have one of these columns.

    Raises:
        InputError: pyarrow or the path is missing, or the file is of another kind.
    """
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise InputError(f'{path}: needs the package pyarrow: pip install "numprune[parquet]"') from None
    try:
        if path.is_dir():
            tables = [ipc.open_stream(pyarrow.memory_map(str(file))).read_all() for file in files_of(path)]
        else:
            tables = [parquet.read_table(path)]
    except FileNotFoundError:
        raise InputError(f"file {str(path)!r} does not exist") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: pyarrow cannot read it: {str(error).splitlines()[0][:300]}") from None
    for table in tables:
        wanted = [name for name in table.column_names if name in fields]
        if not set(needed).intersection(wanted):
            columns = ", ".join(map(repr, table.column_names[:8]))
            names = " or ".join(f'"{name}"' for name in needed)
            raise InputError(f"{path}: no column named {names}; its columns are {columns}")
        for batch in table.select(wanted).to_batches():
            yield from map(_without_nulls, batch.to_pylist())


def files_of(folder: Path) -> list[Path]:
    """Return the data files of a folder written by `Dataset.save_to_disk`.

    Raises:
        InputError: it is another folder; names the folders to give if it contains several splits.
    """
    if (folder / _SPLITS).is_file():
        splits = sorted(path.parent.name for path in folder.glob(f"*/{STATE}"))
        raise InputError(f"{folder}: contains the splits {', '.join(splits)}; give the folder of one of them")
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it names no files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{folder}: is a folder, but not one that `Dataset.save_to_disk` wrote; give the text files in it"
        ) from None
    return [folder / name for name in names]


def _without_nulls(value: Any) -> Any:
    """Drop nulls from nested values: a column has every field in every row, null if it is unused."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
