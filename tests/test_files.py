"""Files appear whole or not at all, and an error names the file that was meant."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from course_lib import files
from course_lib.files import sync, write_whole


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("data", ["two\n", b"two\n"])
def test_a_file_is_made_with_its_folders_and_replaced(tmp_path: Path, data: str | bytes):
    file = tmp_path / "a" / "b" / "report.json"
    write_whole(file, "one")
    write_whole(file, data)
    assert file.read_bytes() == b"two\n"
    assert [each.name for each in file.parent.iterdir()] == ["report.json"]


def test_a_folder_that_was_deleted_is_not_made_again_unless_wanted(tmp_path: Path):
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(tmp_path / "a" / "record.json", "one", folders=False)
    assert caught.value.filename == str(tmp_path / "a" / "record.json")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, full_disk: None):
    file = tmp_path / "report.json"
    file.write_text("one")
    with pytest.raises(OSError) as caught:
        write_whole(file, "two")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(file))
    assert file.read_text() == "one"
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]


def test_text_that_is_no_unicode_leaves_the_old_file(tmp_path: Path):
    file = tmp_path / "report.json"
    write_whole(file, "one")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "\ud800")
    assert file.read_text() == "one"


def test_a_folder_that_cannot_be_made_names_the_file(tmp_path: Path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(OSError) as caught:
        write_whole(tmp_path / "a" / "report.json", "one")
    assert caught.value.filename == str(tmp_path / "a" / "report.json")


def test_flushing_names_the_file_or_the_folder(tmp_path: Path, full_disk: None):
    (tmp_path / "x").write_text("x")
    for path in (tmp_path / "x", tmp_path):
        with pytest.raises(OSError) as caught:
            sync(path)
        assert caught.value.filename == str(path)


def test_what_need_not_survive_a_power_cut_is_not_flushed(tmp_path: Path, full_disk: None):
    write_whole(tmp_path / "progress.json", "one", durable=False)
    assert (tmp_path / "progress.json").read_text() == "one"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such call for folders")
def test_what_must_survive_it_is_flushed_and_its_name_after_it(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(os.fstat(number)))
    write_whole(tmp_path / "report.json", "one")
    assert [stat.S_ISDIR(each.st_mode) for each in flushed] == [False, True]
    assert flushed[0].st_size == len("one")


def test_windows_flushes_files_that_may_be_written_and_no_folders(tmp_path, monkeypatch):
    calls = []
    (tmp_path / "x").touch()
    windows = SimpleNamespace(
        name="nt",
        O_RDWR=2,
        O_RDONLY=0,
        open=lambda path, flags: calls.append(("open", path.name, flags)) or 7,
        fsync=lambda number: calls.append(("fsync", number)),
        close=lambda number: calls.append(("close", number)),
    )
    monkeypatch.setattr(files, "os", windows)
    sync(tmp_path)
    sync(tmp_path / "x")
    assert calls == [("open", "x", 2), ("fsync", 7), ("close", 7)]
