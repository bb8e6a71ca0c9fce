"""Lists of image files and their classes: CSV, TSV, JSON and JSON lines."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Image, Value

from ..splits import SPLIT_NAMES, SPLIT_OF
from .listed import check_files


SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
# Tried, in this order, where the column of the paths is not named.
PATH_COLUMN_NAMES = ("image", "image_path", "path", "file", "file_name", "filename")
SPLIT_COLUMN = "split"


def is_list(path: Path) -> bool:
    """Whether a path is written like that of a list of image files."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def load_list(file: Path, image_column: str | None = None) -> DatasetDict:
    """Load a list of image files, one a row, with a column of paths, one of classes and perhaps one called split.

    Paths are relative to the folder of the list. Without a column `split` (its values are train, validation, test and
    their usual other names) all images are in the train split. JSON is one list of objects, JSON lines one object a
    line.

    Args:
        file: .csv (commas), .tsv (tabs), .json or .jsonl, in UTF-8.
        image_column: Column of the paths. Default: the one called image, image_path, path, file, file_name or
            filename.

    Raises:
        FileNotFoundError: The list or one of its images does not exist.
        ValueError: A column is missing, a row is not whole, or a split is unknown.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no file '{file}'. A data set that ends in {file.suffix} is a list of images and classes: "
            "correct the path."
        )
    rows = _read_rows(file)
    if not rows:
        raise ValueError(f"'{file}' has no rows. One a training image is needed: look whether the file is whole.")
    columns = [column for column in rows[0] if column is not None]
    path_column = image_column or next((name for name in PATH_COLUMN_NAMES if name in columns), None)
    if path_column not in columns:
        raise ValueError(
            f"'{file}' has the columns {columns} and none called {path_column or ', '.join(PATH_COLUMN_NAMES)}. One "
            "with the paths of the images is needed: name it with image_column."
        )
    for number, row in enumerate(rows, start=1):
        if None in row:  # where csv puts what is too much
            raise ValueError(
                f"Row {number} of '{file}' has {len(columns) + len(row[None])} values for {len(columns)} columns. A "
                "value with a comma or tab in it needs quotes: correct the row."
            )
        if empty := [column for column in columns if row.get(column) in (None, "")]:
            raise ValueError(
                f"Row {number} of '{file}' has no {' and no '.join(empty)}. Every image needs a value in every "
                "column: fill it in, or remove the row or the column."
            )
    check_files([file.parent / str(row[path_column]) for row in rows], f"'{file}'")
    splits: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(rows, start=1):
        splits.setdefault(_split_of(row, number, file), []).append(row)
    return DatasetDict(
        {split: _to_dataset(part, rows, columns, path_column, file.parent) for split, part in splits.items()}
    )


def _read_rows(file: Path) -> list[dict[str, Any]]:
    suffix = file.suffix.lower()
    with file.open(encoding="utf-8-sig", newline="") as stream:
        try:
            if suffix == ".jsonl":
                rows = [json.loads(line) for line in stream if line.strip()]
            elif suffix == ".json":
                rows = json.load(stream)
            else:
                rows = list(csv.DictReader(stream, delimiter="," if suffix == ".csv" else "\t"))
        except (json.JSONDecodeError, csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"'{file}' cannot be read as {suffix[1:]} ({error}). A list of images and classes, in UTF-8, "
                "is needed: correct the file, or give it the ending of what it is."
            ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"'{file}' is no list of objects. One object an image, such as "
            '{"image": "cat/1.jpg", "label": "cat"}, is needed: correct the file.'
        )
    return rows


def _split_of(row: dict[str, Any], number: int, file: Path) -> str:
    word = str(row.get(SPLIT_COLUMN, "train")).lower()
    if word not in SPLIT_OF:
        raise ValueError(
            f"Row {number} of '{file}' is in the split '{word}'. There are {', '.join(SPLIT_NAMES)}: correct the row."
        )
    return SPLIT_OF[word]


def _to_dataset(
    part: list[dict[str, Any]], rows: list[dict[str, Any]], columns: list[str], path_column: str, folder: Path
) -> Dataset:
    content: dict[str, list[Any]] = {}
    for column in columns:
        if column == path_column:
            content[column] = [str(folder / str(row[column])) for row in part]
        elif column != SPLIT_COLUMN:
            # Numbers in a CSV are numbers, so that class 2 comes before class 10.
            numbers = all(str(row[column]).lstrip("-").isdecimal() for row in rows)
            content[column] = [int(row[column]) if numbers else str(row[column]) for row in part]
    return Dataset.from_dict(content).cast_column(path_column, Value("string")).cast_column(path_column, Image())
