"""Finds the files of a data source: one file, a folder, a pattern such as data/*.jsonl, or a dataset on the hub."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from budwood.errors import InputError, did_you_mean, unreadable
from budwood.untrusted.hub import hub_errors
from budwood.untrusted.redaction import shorten

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Types of files that hold rows."""
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
"""Types of files that are images."""
ACCEPTED = (
    ".jsonl, .json (a list of objects), .csv, .tsv, .parquet, a folder of such files, a pattern such as data/*.jsonl, "
    "a `datasets` folder, a folder of images (or of a folder of images for each class)"
)
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")
"""Words for a split in the names of files and folders."""
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z")


def hash_files(files: Sequence[Path]) -> str:
    """Return the hex SHA-256 of a file, or of the names and bytes of several.

    Raises:
        ResourceError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                file_digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise unreadable(path, error) from error
        if len(files) == 1:
            return file_digest
        name = f"{path.parent.name}/{path.name}" if is_image(path) else path.name  # its folder is its class
        digest.update(f"{name}\0{file_digest}\0".encode())
    return digest.hexdigest()


def is_datasets_folder(path: Path) -> bool:
    """Return whether a folder was written by `Dataset.save_to_disk`."""
    return (path / "state.json").is_file()


def is_image(path: Path) -> bool:
    """Return whether a file's name is that of an image."""
    return path.suffix.lower() in IMAGES


def is_hub_name(name: str) -> bool:
    """Return whether a name is one of a dataset on the hub: owner/name, and nothing of that path is on this machine."""
    path = Path(name)
    return HUB_NAME.fullmatch(name) is not None and path.suffix not in SUFFIXES and not path.parent.exists()


def exists(name: str) -> bool:
    """Return whether a file, a folder or a match of a pattern exists; a hub name is believed."""
    return Path(name).exists() or is_hub_name(name) or bool(_is_pattern(name) and glob.glob(name, recursive=True))


def find_files(
    path: str | Path, split: str | None = None, revision: str | None = None, config: str | None = None
) -> list[Path]:
    """Return the files that hold the data of a source, without reading them.

    Args:
        path: a file, a folder, a pattern, or the name of a dataset on the hub, which is downloaded to its cache.
        split: only the files of this split, by their names or that of their folder.
        revision: branch, tag or commit of a hub name.
        config: only the files in this folder of the source, which the hub calls a configuration, such as a language.

    Raises:
        InputError: the source is missing, empty, of an unknown type, or has several splits or configurations and none
            is given.
        ResourceError: a folder cannot be read, or the hub cannot be reached.
    """
    name, path = str(path), Path(path)
    try:
        if is_hub_name(name):
            return _find_in_folder(_from_hub(name, revision, config), split, name, config)
        if revision is not None:
            raise InputError(f"{name}: a revision ('{shorten(revision)}') is only for a hub name: leave it out.")
        if not path.exists() and _is_pattern(name):
            found = sorted(Path(match) for match in glob.glob(name, recursive=True) if Path(match).is_file())
            if not found:
                raise InputError(f"{name}: no file matches the pattern (from {Path.cwd()}).")
            return _of_split([_check_file(file) for file in found], split, name, "")
        if path.is_dir():
            return _find_in_folder(path, split, name, config)
        for word, value in (("split", split), ("config", config)):
            if value is not None:
                raise InputError(f"{name}: a {word} ('{shorten(value)}') is for a folder or a hub name: leave it out.")
        return [_check_file(path)]
    except OSError as error:
        raise unreadable(name, error) from error


def _is_pattern(name: str) -> bool:
    return any(character in name for character in "*?[")


def _check_file(path: Path) -> Path:
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
    return path


def _find_in_folder(
    path: Path, split: str | None, name: str, config: str | None = None, source: str = ""
) -> list[Path]:
    """Return the data files of a folder, or of its folder data/, or of the one folder in it that holds data.

    Args:
        name: the folder's name in messages; `source`: how a recipe names what it is part of.
    """
    source = source or f"path: {name}"
    if config is not None:
        folder = _config_folder(path, config, name)
        return _find_in_folder(folder, split, f"{name}/{config}", None, f"{source}, config: {config}")
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir()) or ["none"]
        if split not in splits:
            first = "train" if "train" in splits else splits[0]
            raise InputError(f"{name}: holds the splits {', '.join(splits)}. Name one of them: {Path(name) / first}.")
        path = path / str(split)
    if is_datasets_folder(path):
        return sorted(p for p in path.iterdir() if p.suffix in (".arrow", ".json") and p.is_file())
    for folder in (path, path / "data"):
        files = sorted(filter(_is_data, folder.iterdir() if folder.is_dir() else ()))
        if files:
            place = Path(name) / folder.relative_to(path)
            others = list(_data_folders(path)) if split is None else []
            if split is None and folder == path and _holds_data(path / "data"):
                others.append("data")
            if others:
                words = sorted(filter(None, map(_split_word, files)))  # a pattern is none for a hub name
                own = f"split: {words[0]}" if words else str(place / f"*{files[0].suffix}")
                raise InputError(
                    f"{place}: holds data files beside folders with data ({_listed(others)}). Name what you mean: "
                    f"{own} for the files, or one of the folders."
                )
            return _of_split([_check_file(file) for file in files], split, str(place), source)
    folders = _data_folders(path)
    if split in folders:
        return _find_in_folder(folders[str(split)], None, f"{name}/{split}")
    if len(folders) == 1:
        ((only, folder),) = folders.items()
        if split is None or only not in SPLITS:
            return _find_in_folder(folder, split, f"{name}/{only}", None, source)
    if not folders:
        images = _find_images(path if split is None else path / split, name)
        if images:
            return images
        inside = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        shown = f" Its folders: {', '.join(map(shorten, inside[:10]))}." if inside else ""
        raise InputError(
            f"{name}: neither a `datasets` folder nor a folder of data files.{shown} Accepted: {ACCEPTED}."
        )
    word = "split" if set(folders) <= set(SPLITS) else "config"
    first = "train" if "train" in folders else next(iter(folders))
    raise InputError(
        f"{name}: holds data in the folders {_listed(folders)}. "
        f"Name one of them: {{{source}, {word}: {shorten(first)}}} in a recipe."
    )


def _find_images(path: Path, name: str) -> list[Path]:
    """Return the images in a folder, or in its folders, one for each class; an empty list if there are none.

    Raises:
        InputError: there are images in both, or the folders are splits.
    """
    if not path.is_dir():
        return []
    inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    own = [p for p in inside if is_image(p)]
    folders = [p for p in inside if p.is_dir()]
    classes = {p: sorted(q for q in p.iterdir() if is_image(q)) for p in folders}
    found = [image for images in classes.values() for image in images]
    if own and found:
        raise InputError(f"{name}: holds images beside folders of images: move {own[0].name} to the folder of a class.")
    deeper = [p.name for p in folders if any(is_image(r) for q in p.iterdir() if q.is_dir() for r in q.iterdir())]
    splits = [p.name for p in folders if p.name.lower() in SPLITS and (p.name in deeper or classes[p])]
    if splits and len(splits) == len([p for p in folders if classes[p] or p.name in deeper]):
        raise InputError(f"{name}: holds the splits {', '.join(splits)}. Name one of them: {Path(name) / splits[0]}.")
    empty = next((p.name for p in folders if found and not classes[p]), None)
    if empty is not None:
        raise InputError(f"{name}: the folder '{shorten(empty)}' of a class has no images: add some, or remove it.")
    return own or found


def _config_folder(path: Path, config: str, name: str) -> Path:
    folders = _data_folders(path)
    if config not in folders:
        known = _listed(folders) or "none"
        raise InputError(
            f"{name}: no folder '{shorten(config)}' with data.{did_you_mean(config, folders)} Its folders: {known}."
        )
    return folders[config]


def _data_folders(path: Path) -> dict[str, Path]:
    """Return the folders in a folder, or in its folder data/, that hold data, by name."""
    inside = (p for folder in (path, path / "data") if folder.is_dir() for p in sorted(folder.iterdir()))
    return {p.name: p for p in inside if p.is_dir() and p != path / "data" and _holds_data(p)}


def _holds_data(folder: Path, depth: int = 2) -> bool:
    """Return whether a folder has files of rows, by itself or in a folder for a split; a run's folder has none."""
    is_run = all((folder / name).is_file() for name in ("metrics.jsonl", "recipe.yaml"))
    if folder.name.startswith(".") or not depth or is_run:
        return False
    try:
        inside = list(folder.iterdir())
        own = is_datasets_folder(folder) or any(map(_is_data, inside))
        return own or any(_holds_data(p, depth - 1) for p in inside if p.is_dir())
    except OSError:  # somebody else's folder
        return False


def _is_data(path: Path) -> bool:
    """Return whether a file in a folder holds rows; a .json file does if its name has the word for a split."""
    suffix = path.suffix.lower()
    return suffix in SUFFIXES and path.is_file() and (suffix != ".json" or bool(_split_word(path)))


def _listed(folders: Iterable[str]) -> str:
    names = [shorten(name) for name in folders]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _of_split(files: list[Path], split: str | None, name: str, source: str) -> list[Path]:
    """Return the files of one split.

    Raises:
        InputError: there are several splits and none is named, or not that one.
    """
    splits: dict[str, list[Path]] = {}
    for file in files:
        shard = re.fullmatch(r"(.+?)(-\d{5}-of-\d{5}(-[0-9a-f]+)?)?", file.stem)
        key = shard[1] if shard and shard[2] else _split_word(file)
        splits.setdefault(key, []).append(file)
    if split is not None:
        if split not in splits:
            known = ", ".join(filter(None, splits)) or "none that their names tell"
            raise InputError(f"{name}: no split '{shorten(split)}'.{did_you_mean(split, splits)} Its splits: {known}.")
        return splits[split]
    if len(splits) > 1 and not _is_pattern(name):
        named = sorted(filter(None, splits))
        first = "train" if "train" in named else named[0]
        pattern = ""
        if Path(name).is_dir() and all(file.name.startswith(first) for file in splits[first]):
            pattern = f"{Path(name) / first}*{splits[first][0].suffix}, or "
        raise InputError(
            f"{name}: holds the splits {', '.join(named)}{' and other files' if '' in splits else ''}. "
            f"Name one of them: {pattern}{{{source}, split: {first}}} in a recipe."
        )
    return files


def _split_word(file: Path) -> str:
    """Return the word for a split in a file's name, such as train in en_train-v2.jsonl, or an empty string."""
    words = re.findall(r"[a-z]+", file.stem.lower())
    return next((word for word in words if word in SPLITS), "")


def _from_hub(name: str, revision: str | None, config: str | None) -> Path:
    """Download the data files of a dataset to the hub's cache; return their folder."""
    from huggingface_hub import snapshot_download

    folders = [""] if config is None else [f"{config}/", f"data/{config}/"]
    wanted = [f"{folder}*{suffix}" for folder in folders for suffix in SUFFIXES]  # a star matches slashes, too
    with hub_errors("dataset", name, revision):
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=wanted))


def total_size(files: Iterable[Path]) -> int:
    """Return the size of files in bytes."""
    return sum(file.stat().st_size for file in files)
