"""Finds the files of a data source: one file, or a folder of them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from budwood.errors import InputError, did_you_mean

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Types of files that hold rows."""
ACCEPTED = ".jsonl, .json (a list of objects), .csv, .tsv, .parquet, a `datasets` folder, a folder of Parquet files"
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z")


def hash_file(path: Path) -> str:
    """Return the hex SHA-256 of a data file, or of the names and bytes of a data folder's files.

    Raises:
        InputError: the file or folder cannot be read, or its type is unknown.
    """
    digest = hashlib.sha256()
    try:
        for file_path in find_files(path):
            with file_path.open("rb") as file:
                file_digest = hashlib.file_digest(file, "sha256").hexdigest()
            if file_path == path:
                return file_digest
            digest.update(f"{file_path.name}\0{file_digest}\0".encode())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()


def find_files(path: Path) -> list[Path]:
    """Return the files that hold the data of a file or folder, without reading them.

    Raises:
        InputError: the file or folder is missing, empty, or of an unknown type.
    """
    try:
        if path.is_dir():
            return _find_in_folder(path)
        if not path.exists():
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise InputError(f"{path}: no such file.{did_you_mean(path.name, siblings)}")
        if not path.is_file():
            raise InputError(f"{path}: not a regular file. Save the data to a file first.")
        suffix = path.suffix.lower()
        if suffix in _COMPRESSED:
            raise InputError(f"{path}: compressed files are not supported. Decompress it first.")
        if suffix not in SUFFIXES:
            raise InputError(f"{path}: unknown file type '{suffix or path.name}'. Accepted: {ACCEPTED}.")
        if not path.stat().st_size:
            raise InputError(f"{path}: the file is empty.")
        return [path]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _find_in_folder(path: Path) -> list[Path]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir()) or ["none"]
        raise InputError(f"{path}: holds the splits {', '.join(splits)}. Name one of them: {path / splits[0]}.")
    if (path / "state.json").is_file():
        return sorted(p for p in path.iterdir() if p.suffix in (".arrow", ".json") and p.is_file())
    files = sorted(p for p in path.glob("*.parquet") if p.is_file())
    if not files:
        raise InputError(f"{path}: neither a `datasets` folder nor a folder of Parquet files. Accepted: {ACCEPTED}.")
    shards = {match[1] for file in files if (match := re.fullmatch(r"(.+)-\d{5}-of-\d{5}\.parquet", file.name))}
    if len(shards) > 1:
        raise InputError(f"{path}: holds the splits {', '.join(sorted(shards))}. Put each split in a separate folder.")
    return files
