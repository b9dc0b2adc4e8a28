"""Hostile names, and interrupted writes of folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from budwood import CorruptError, InputError, ResourceError
from budwood.untrusted import files


@pytest.mark.parametrize("name", ["a", "v1.2", "my-adapter_3", "lora_a", "x" * 64])
def test_valid_names(name):
    assert files.check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/abs", "a/b", "a\\b", "-x", ".hidden", "a..b", "a.", "x" * 65, "x" * 300]
    + ["con", "NUL.txt", "lpt1", "a\nb", "a\0b", "a b", "ä", "a:b", "~", "*"],
)
def test_names_that_leave_their_folder_or_are_invalid_on_a_system_are_refused_in_one_line(name):
    with pytest.raises(InputError) as error:
        files.check_name(name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("path", ["runs/a b", "/tmp/x", "../x", "ä/日本", "x.con", "console", "/dev/shm/x", "runs/.."])
def test_valid_folders(path):
    assert files.check_folder(Path(path)) == Path(path)


@pytest.mark.parametrize(
    "path",
    ["a\nb", "a\x1b[31mb", "runs/a\u202eb/c", "a\u200bb", "a\x00b", "a\x7f", "a\u2066b", "x" * 256, "ä" * 128]
    + ["runs/CON", "NUL.txt/x", "aux", "com1.log", "/dev/sda", "/dev/null/x", "/proc/self/x", "/sys/x", "/x/../dev/x"],
)
def test_device_folders_and_misleading_names_are_refused_in_one_line(path, tmp_path):
    with pytest.raises(InputError) as error:
        files.check_folder(Path(path))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 250
    with pytest.raises(InputError), files.complete_directory(tmp_path / path):
        pass
    assert list(tmp_path.rglob("*")) == []


def test_files_outside_their_folder_are_refused(tmp_path):
    folder = tmp_path / "adapter"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("a")
    (tmp_path / "adapter2").mkdir()
    (tmp_path / "adapter2" / "b").write_text("b")
    (folder / "inside").symlink_to("sub/../a")
    (folder / "out").symlink_to(tmp_path / "adapter2" / "b")
    (folder / "sub" / "up").symlink_to("../../adapter2")
    (folder / "loop").symlink_to("loop")
    files.check_inside(folder, ["a", "inside", "missing", "loop", "sub/x"])
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    files.check_inside(linked, ["a", "inside"])  # the user gave this path
    names = ["out", "sub/up/b", "../adapter2/b", str(tmp_path / "adapter2" / "b"), "sub/../../adapter2/b", "~/x"]
    for name in [*names, "/etc/passwd", "a\0", "a\n", "\u202e", "x" * 201, "."]:
        with pytest.raises(CorruptError) as error:
            files.check_inside(folder, [name])
        assert str(error.value).isprintable()


def test_links_in_the_hubs_cache_are_accepted(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "sha").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/sha")
    files.check_inside(snapshot, ["config.json"])
    (snapshot / "other").symlink_to("../../refs")
    with pytest.raises(CorruptError, match="leads out"):
        files.check_inside(snapshot, ["other"])


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "target"
    with files.complete_directory(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_files_have_the_default_mode_of_new_files(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with files.complete_directory(tmp_path / "adapter") as folder:
        save_file({"a": torch.ones(2)}, folder / "a.safetensors")
    assert (tmp_path / "adapter" / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), files.complete_directory(target, replace=True) as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in target.iterdir()] == ["old"]
    with files.complete_directory(target, replace=True) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("exchange", [True, False])
def test_the_old_folder_is_intact_whichever_system_call_fails(tmp_path, monkeypatch, exchange):
    """Fail the N-th sync, rename or exchange, for N = 1, 2, …, until none fails."""
    target = tmp_path / "target"
    calls = {"left": 0}

    def failing(function):
        def call(*args, **kwargs):
            calls["left"] -= 1
            if calls["left"] == 0:
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(files, "_exchange", failing(files._exchange if exchange else lambda first, second: False))
    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(Path, "rename", failing(Path.rename))
    for attempt in range(1, 50):
        calls["left"] = 0
        with files.complete_directory(target, replace=True) as folder:
            (folder / "a").write_text("old")
        calls["left"] = attempt
        try:
            with files.complete_directory(target, replace=True) as folder:
                (folder / "a").write_text("new")
        except ResourceError as error:
            assert "No space left" in str(error)
        else:
            break
        holders = [target, tmp_path / ".target.old"]
        contents = [(holder / "a").read_text() for holder in holders if holder.exists()]
        assert contents
        assert set(contents) <= {"old", "new"}
    assert calls["left"] > 0
    assert attempt > 4


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "target").mkdir()
    with files.complete_directory(tmp_path / "target") as folder:  # an empty folder is accepted
        (folder / "a").write_text("1")
    with pytest.raises(InputError, match="exists"), files.complete_directory(tmp_path / "target"):
        pass


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"), files.complete_directory(tmp_path / "file" / "x"):
        pass


def test_a_complete_file_is_written_by_a_function_with_the_users_mode(tmp_path):
    """safetensors creates files that only their owner may read."""

    def write(path):
        path.write_bytes(b"new")
        path.chmod(0o600)

    before = os.umask(0o022)
    try:
        files.complete_file(tmp_path / "a", write)
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bug"), OSError(28, "No space left on device")])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")

    def write(path):
        path.write_bytes(b"half")
        raise error

    expected = ResourceError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as raised:
        files.complete_file(tmp_path / "a", write)
    if isinstance(error, OSError):
        assert "bytes are needed" in str(raised.value) and str(tmp_path / "a") in str(raised.value)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
