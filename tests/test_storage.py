"""The store: all or nothing, whatever interrupts it, and names that stay inside it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from course_lib.engine import storage, tensors
from course_lib.engine.names import TinkerPath, checked_name, parse_path, run_id_of
from course_lib.engine.records import (
    UNFINISHED,
    CheckpointRecord,
    RunRecord,
    SessionRecord,
    expiry,
    iso,
    now,
)
from course_lib.engine.requests import NotFoundError, RequestError
from course_lib.engine.storage import NEXT, Store
from course_lib.engine.tensors import ADAPTER, Scratch, read_tensors, write_adapter

RUN = "abc:train:0"
PATH = TinkerPath(RUN, "weights", "one")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def record(path: TinkerPath = PATH, **fields: object) -> CheckpointRecord:
    given = {"path": str(path), "owner": "local", "base_model": "m", "fingerprint": "f", "lora": {}}
    return CheckpointRecord(**(given | {"created_at": iso(now())} | fields))


def writes(text: str):
    return lambda folder: (folder / "file").write_text(text)


def test_a_saved_checkpoint_is_found_again(store: Store):
    saved = store.save(PATH, record(), writes("hello"))
    assert saved.size_bytes == 5
    assert Store(store.root).checkpoint(PATH) == saved
    assert (store.folder(PATH) / "file").read_text() == "hello"


def test_a_taken_name_is_refused_and_overwrite_replaces(store: Store):
    store.save(PATH, record(), writes("first"))
    with pytest.raises(RequestError, match=r"exists already; .* or pass overwrite=True"):
        store.save(PATH, record(), writes("second"))
    store.save(PATH, record(), writes("third"), overwrite=True)
    assert (store.folder(PATH) / "file").read_text() == "third"
    assert [p.name for p in store.folder(PATH).parent.iterdir()] == ["one"]


def test_a_taken_samplers_name_is_refused_without_a_remedy_that_the_sdk_lacks(store: Store):
    path = TinkerPath(RUN, "sampler_weights", "one")
    store.save(path, record(path), writes("first"))
    with pytest.raises(RequestError, match=r"choose another name$"):
        store.save(path, record(path), writes("second"))


def test_a_checkpoint_is_on_disk_before_it_is_visible(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    synced: list[tuple[str, bool]] = []

    def note(name: str):
        return lambda folder: synced.append((name, (store.folder(PATH) / "file").exists()))

    monkeypatch.setattr(storage, "sync_folder", note("its files"))
    monkeypatch.setattr(storage, "sync", note("its name"))
    store.save(PATH, record(), writes("x"))
    assert synced == [("its files", False), ("its name", True)]


def test_a_failing_write_leaves_nothing_behind(store: Store):
    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RequestError, match=r"Could not save .*No space left"):
        store.save(PATH, record(), fail)
    assert list((store.run_dir(RUN) / "weights").iterdir()) == []
    with pytest.raises(NotFoundError):
        store.checkpoint(PATH)


def test_a_save_that_is_interrupted_leaves_nothing_behind(store: Store):
    def interrupted(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.save(PATH, record(), interrupted)
    assert list((store.run_dir(RUN) / "weights").iterdir()) == []


def test_an_overwrite_takes_the_place_of_one_that_a_killed_process_began(store: Store):
    store.save(PATH, record(), writes("old"))
    left = store.folder(PATH).with_name("one" + NEXT)
    left.mkdir()
    (left / "file").write_text("left")
    store.save(PATH, record(), writes("new"), overwrite=True)
    assert (store.folder(PATH) / "file").read_text() == "new"
    assert [p.name for p in store.folder(PATH).parent.iterdir()] == ["one"]


def test_a_failing_overwrite_leaves_the_old_one(store: Store):
    store.save(PATH, record(), writes("old"))

    def fail(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RequestError):
        store.save(PATH, record(), fail, overwrite=True)
    assert (store.folder(PATH) / "file").read_text() == "old"


def test_a_full_disk_says_what_to_do_where_no_checkpoint_is_saved(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    """A cell that only asked for a new client ended in "Could not save the record of session"."""

    def full(path: Path, mode: str):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("course_lib.files.open", full, raising=False)
    with pytest.raises(RequestError, match=r"session s1: No space.*; free disk space where"):
        store.write_session(SessionRecord("s1", "local", iso(now())))


@pytest.mark.parametrize("steps", range(4))
def test_killed_within_an_overwrite_either_version_is_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch, steps: int
):
    """The process ends after 0, 1, 2 or all 3 of the renames that replace a checkpoint."""
    store.save(PATH, record(), writes("old"))
    rename, done = Path.rename, 0

    class Killed(BaseException): ...

    def rename_until_killed(self: Path, target: Path) -> Path:
        nonlocal done
        if done == steps:
            raise Killed
        done += 1
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_until_killed)
    monkeypatch.setattr(storage.shutil, "rmtree", lambda *a, **k: None)
    if steps < 3:
        with pytest.raises(Killed):
            store.save(PATH, record(), writes("new"), overwrite=True)
    else:
        store.save(PATH, record(), writes("new"), overwrite=True)
    monkeypatch.undo()
    after = Store(store.root)
    assert (after.folder(PATH) / "file").read_text() == ("old" if steps < 2 else "new")
    assert [c.path for c in after.checkpoints(RUN)] == [str(PATH)]


def test_a_deleted_checkpoint_does_not_come_back(store: Store):
    """A replacement that a killed process left behind took the deleted one's place."""
    store.save(PATH, record(), writes("old"))
    left = store.folder(PATH).with_name("one" + NEXT)
    left.mkdir()
    (left / storage.RECORD).write_text(json.dumps(record().__dict__))
    store.delete(PATH)
    assert store.checkpoints(RUN) == []
    assert not list((store.run_dir(RUN) / "weights").iterdir())
    with pytest.raises(NotFoundError):
        store.delete(PATH)


def test_a_look_at_the_wrong_moment_does_not_break_an_overwrite(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    """A reader finished the rename that a living save was in the middle of, and the save failed."""
    store.save(PATH, record(), writes("old"))
    rename, pool, looks = Path.rename, ThreadPoolExecutor(1), []

    def rename_while_another_looks(self: Path, target: Path) -> Path:
        renamed = rename(self, target)
        looks.append(pool.submit(store.checkpoint, PATH))
        wait(looks, timeout=0.05)
        return renamed

    monkeypatch.setattr(Path, "rename", rename_while_another_looks)
    saved = store.save(PATH, record(), writes("newer"), overwrite=True)
    assert [look.result(5) for look in looks] == [saved] * 3
    assert [p.name for p in store.folder(PATH).parent.iterdir()] == ["one"]


def test_another_process_may_finish_an_overwrite(store: Store, monkeypatch: pytest.MonkeyPatch):
    store.save(PATH, record(), writes("old"))
    rename, other = Path.rename, Store(store.root)

    def rename_and_look(self: Path, target: Path) -> Path:
        renamed = rename(self, target)
        if self.name == "one":
            monkeypatch.undo()
            assert (other.folder(PATH) / "file").read_text() == "new"
        return renamed

    monkeypatch.setattr(Path, "rename", rename_and_look)
    store.save(PATH, record(), writes("new"), overwrite=True)
    assert [p.name for p in store.folder(PATH).parent.iterdir()] == ["one"]


def test_a_checkpoint_that_another_process_replaces_just_now_is_found(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    """The old one was seen, then moved away before its record was read: no such checkpoint."""
    store.save(PATH, record(), writes("old"))
    look, folder = storage.read_record, store.folder(PATH)

    def look_too_late(*arguments: object) -> object:
        monkeypatch.undo()
        other = folder.with_name("one" + NEXT)
        shutil.copytree(folder, other)
        folder.rename(folder.with_name(UNFINISHED + "aside"))
        return look(*arguments)

    monkeypatch.setattr(storage, "read_record", look_too_late)
    assert store.checkpoint(PATH).path == str(PATH)


def test_what_is_read_is_of_one_version(store: Store):
    """An overwrite between two files gave the old weights with the new optimizer."""
    store.save(PATH, record(), writes("old"))
    other, seen = Store(store.root), []

    def read_two(folder: Path) -> list[str]:
        seen.append((folder / "file").read_text())
        if len(seen) == 1:
            other.save(PATH, record(), writes("new"), overwrite=True)
        return [seen[-1], (folder / "file").read_text()]

    assert store.read(PATH, read_two) == ["new", "new"]
    assert seen == ["old", "new"]


def test_a_file_that_is_missing_while_a_checkpoint_is_replaced_is_looked_for_again(store: Store):
    store.save(PATH, record(), writes("old"))

    def read(folder: Path) -> str:
        if (folder / "file").read_text() == "old":
            store.save(PATH, record(), writes("new"), overwrite=True)
            raise FileNotFoundError
        return "new"

    assert store.read(PATH, read) == "new"
    with pytest.raises(FileNotFoundError):
        store.read(PATH, lambda folder: (folder / "missing").read_text())


def test_a_run_is_claimed_once(store: Store):
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(store.claim_run, [RUN] * 8))
    assert sorted(claims) == [False] * 7 + [True]
    assert store.runs() == []
    store.unclaim_run(RUN)
    assert store.claim_run(RUN)


def test_an_overwrite_of_what_another_process_deletes_meanwhile_has_failed(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    store.save(PATH, record(), writes("old"))
    rename = Path.rename

    def rename_and_delete(self: Path, target: Path) -> Path:
        monkeypatch.undo()
        renamed = rename(self, target)
        Store(store.root).delete(PATH)
        return renamed

    monkeypatch.setattr(Path, "rename", rename_and_delete)
    with pytest.raises(RequestError, match="Could not save"):
        store.save(PATH, record(), writes("new"), overwrite=True)
    assert store.checkpoints(RUN) == []


def test_a_failing_rename_leaves_nothing_aside(store: Store, monkeypatch: pytest.MonkeyPatch):
    store.save(PATH, record(), writes("old"))
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(NEXT):
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RequestError, match="Permission denied"):
        store.save(PATH, record(), writes("new"), overwrite=True)
    monkeypatch.undo()
    assert (store.folder(PATH) / "file").read_text() == "new"
    assert [p.name for p in store.folder(PATH).parent.iterdir()] == ["one"]


def test_a_record_changed_while_it_is_deleted_leaves_no_ghost(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    """The changed record was written into a folder made anew: a checkpoint without weights."""
    store.save(PATH, record(), writes("x"))
    write_json = storage.write_json

    def delete_and_write(*arguments: object) -> None:
        Store(store.root).delete(PATH)  # by another process
        write_json(*arguments)

    monkeypatch.setattr(storage, "write_json", delete_and_write)
    with pytest.raises(RequestError, match="Could not save"):
        store.update(PATH, public=True)
    assert store.checkpoints(RUN) == []
    assert not store.folder(PATH).exists()


def test_listings_at_once_may_meet_the_same_expired_checkpoint(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    store.save(PATH, record(expires_at=iso(now() - timedelta(seconds=1))), writes("x"))
    delete = store.delete

    def come_second(path: TinkerPath) -> None:
        Store(store.root).delete(path)
        delete(path)

    monkeypatch.setattr(store, "delete", come_second)
    assert store.checkpoints(RUN) == []


def test_unfinished_folders_are_invisible(store: Store):
    store.save(PATH, record(), writes("x"))
    (store.run_dir(RUN) / "weights" / f"{UNFINISHED}123").mkdir()
    (store.run_dir(RUN) / "weights" / "without-a-record").mkdir()
    assert [found.path for found in store.checkpoints(RUN)] == [str(PATH)]


def test_what_a_killed_save_left_is_swept_when_it_is_old(store: Store):
    store.save(PATH, record(), writes("x"))
    old, new = (store.folder(PATH).with_name(f"{UNFINISHED}{age}") for age in ("old", "new"))
    for part in (old, new):
        part.mkdir()
        (part / ADAPTER).write_text("half")
    os.utime(old, (0, 0))
    os.utime(store.folder(PATH), (0, 0))
    Store(store.root)
    assert {p.name for p in new.parent.iterdir()} == {"one", new.name}


def test_an_expired_checkpoint_is_gone(store: Store):
    store.save(PATH, record(expires_at=iso(now() - timedelta(seconds=1))), writes("x"))
    with pytest.raises(NotFoundError):
        store.checkpoint(PATH)
    assert store.checkpoints(RUN) == []
    assert not store.folder(PATH).exists()


def test_an_expired_checkpoint_gives_its_name_back(store: Store):
    """It "exists already", though every reader said that it did not."""
    store.save(PATH, record(expires_at=iso(now() - timedelta(seconds=1))), writes("old"))
    store.save(PATH, record(), writes("new"))
    assert (store.folder(PATH) / "file").read_text() == "new"
    with pytest.raises(RequestError, match="exists already"):
        store.save(PATH, record(), writes("newer"))


@pytest.mark.parametrize("ttl", [0, 3599, 11 * 365 * 24 * 3600, -5])
def test_a_time_to_live_out_of_range_is_refused(ttl: int):
    with pytest.raises(RequestError, match="ttl_seconds"):
        expiry(ttl)


def test_changing_a_record_keeps_the_rest(store: Store):
    store.save(PATH, record(), writes("x"))
    assert store.update(PATH, public=True) == store.checkpoint(PATH)
    assert store.checkpoint(PATH).public
    assert store.checkpoint(PATH).base_model == "m"


def test_runs_come_back_the_last_used_first(store: Store):
    for index, run_id in enumerate(["a:train:0", "b:train:0"]):
        moment = iso(now() + timedelta(seconds=index))
        store.write_run(RunRecord(run_id, "local", run_id[0], "m", "f", {}, moment, moment))
    assert [run.run_id for run in store.runs()] == ["b:train:0", "a:train:0"]
    assert [store.run(f"{name}:train:0") for name in "ba"] == store.runs()


def test_checkpoints_and_sessions_come_back_the_newest_first(store: Store):
    for name, seconds in {"b": 1, "c": 3, "a": 2}.items():
        moment = iso(now() + timedelta(seconds=seconds))
        path = TinkerPath(RUN, "weights", name)
        store.save(path, record(path, created_at=moment), writes("x"))
        store.write_session(SessionRecord(name, "local", moment))
    assert [found.path[-1] for found in store.checkpoints(RUN)] == ["c", "a", "b"]
    assert [found.session_id for found in store.sessions()] == ["c", "a", "b"]
    assert store.session("a") == store.sessions()[1] and store.session("d") is None


def test_samplers_join_their_session_each_once(store: Store):
    """A record of an earlier version holds the first ones itself."""
    kept = SessionRecord("s1", "local", iso(now()), sampler_ids=["s1:sample:0"])
    store.write_session(kept)
    for number in (1, 2, 1):  # a request sent again
        store.add_sampler("s1", f"s1:sample:{number}")
    store.write_session(kept)
    assert store.session("s1") == store.sessions()[0]
    assert store.sessions()[0].sampler_ids == [f"s1:sample:{number}" for number in range(3)]


@pytest.mark.parametrize("session_id", ["../runs/x", "/etc/x", "", "a/b"])
def test_a_session_id_cannot_leave_the_store(store: Store, session_id: str):
    with pytest.raises(RequestError, match="is not a session id"):
        store.session(session_id)
    with pytest.raises(RequestError, match="is not a session id"):
        store.write_session(SessionRecord(session_id, "local", iso(now())))


def test_a_damaged_record_is_passed_over(store: Store):
    folder = store.run_dir("a:train:0")
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"run_id": ')
    assert store.runs() == []


BAD_NAMES = """\
    . .. a/b a\\b /etc C:x ~part-1 x~next -x é nul COM1.txt dot. .hidden\
"""
BAD_PATHS = """\
    tinker:// tinker://abc:train:0/weights tinker://../weights/x /etc/passwd
    tinker://abc:train:0/secrets/x tinker://a/b:train:0/weights/x tinker://abc/weights/x
    tinker://abc:train:0/weights/../x tinker://abc:train:-1/weights/x file://x/weights/y
"""


@pytest.mark.parametrize("name", [*BAD_NAMES.split(), "", "a b", "a\n", "a\0b", "n" * 10_000])
def test_names_that_could_leave_the_store_are_refused(name: str):
    with pytest.raises(RequestError) as error:
        checked_name(name)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("path", [*BAD_PATHS.split(), ""])
def test_paths_that_are_not_ours_are_refused(path: str):
    with pytest.raises(RequestError):
        parse_path(path)


def test_a_path_reads_back_as_it_was_written():
    assert str(parse_path(str(PATH))) == "tinker://abc:train:0/weights/one"
    assert run_id_of("abc", 7) == "abc:train:7"
    with pytest.raises(RequestError):
        run_id_of("abc", -1)


def test_a_link_in_the_store_is_not_followed(store: Store, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / storage.RECORD).write_text(json.dumps(record().__dict__))
    (store.run_dir(RUN) / "weights").mkdir(parents=True)
    (store.run_dir(RUN) / "weights" / "one").symlink_to(outside)
    with pytest.raises(NotFoundError, match="link"):
        store.checkpoint(PATH)
    assert store.checkpoints(RUN) == []


def test_weights_are_read_back_and_damage_is_told(tmp_path: Path):
    state = {"layer.lora_A.weight": torch.arange(4.0).reshape(2, 2).T}  # not contiguous
    write_adapter(tmp_path, state, {"r": 2, "target_modules": {"b", "a"}})
    back = read_tensors(tmp_path / ADAPTER, "it")
    assert torch.equal(back["layer.lora_A.weight"], state["layer.lora_A.weight"])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [
        "a",
        "b",
    ]
    file = tmp_path / ADAPTER
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(RequestError, match=r"it: adapter_model.safetensors cannot be read"):
        read_tensors(file, "it")
    file.write_bytes(b"")
    with pytest.raises(RequestError, match="cannot be read"):
        read_tensors(file, "it")
    file.unlink()
    with pytest.raises(RequestError, match="cannot be read"):
        read_tensors(file, "it")


def test_a_file_that_the_system_will_not_hold_fails_that_save_alone(tmp_path: Path):
    """A limit on file size stands in for a full disk: the write fails in the middle."""
    pytest.importorskip("resource")
    code = """
        import resource, sys, torch
        from course_lib.engine.requests import RequestError
        from course_lib.engine.tensors import write_adapter
        sys.path.insert(0, sys.argv[2])
        from test_storage import PATH, Store, record
        store, state = Store(sys.argv[1]), {"x": torch.zeros(100_000)}
        save = lambda: store.save(PATH, record(), lambda to: write_adapter(to, state, {}))
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
        try:
            save()
        except RequestError as error:
            print(error)
        print(store.checkpoints(PATH.run_id))
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        print(save().size_bytes > 400_000)
    """
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(code),
        str(tmp_path),
        str(Path(__file__).parent),
    ]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, check=True)
    error, listed, saved = done.stdout.splitlines()
    assert error.startswith(f"Could not save {PATH}: ") and "too large" in error
    assert (listed, saved) == ("[]", "True")


def test_scratch_of_a_killed_process_is_swept(tmp_path: Path):
    """kill -9 leaves parked weights; the next start removes them, but no living process's."""
    code = """
        import os, signal, sys, torch
        from pathlib import Path
        from course_lib.engine.tensors import Scratch
        Scratch(Path(sys.argv[1])).write("x", {"t": torch.zeros(1)})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], timeout=60, check=False
    )
    assert len(list((tmp_path / "scratch").iterdir())) == 1
    living = Scratch(tmp_path)
    living.write("y", {"t": torch.ones(1)})
    Scratch(tmp_path)
    assert living.read("y")["t"].item() == 1.0
    assert len(list((tmp_path / "scratch").iterdir())) == 2


def test_scratch_that_never_got_its_name_is_swept_when_it_is_old(tmp_path: Path):
    parts = [tmp_path / "scratch" / f"{UNFINISHED}{age}" for age in ("old", "new")]
    for part in parts:
        part.mkdir(parents=True)
    os.utime(parts[0], (0, 0))
    Scratch(tmp_path)
    assert [part.exists() for part in parts] == [False, True]


def test_without_locks_no_file_is_open_when_scratch_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Windows has no such locks, and refuses to rename a folder in which a file is open."""
    opened, rename = [], Path.rename

    def rename_as_windows(self: Path, target: Path) -> Path:
        assert all(stream.closed for stream in opened)
        return rename(self, target)

    monkeypatch.setattr(tensors, "_try_lock", opened.append)  # which gives None
    monkeypatch.setattr(Path, "rename", rename_as_windows)
    scratch = Scratch(tmp_path)
    Scratch(tmp_path)
    assert len(opened) == 3 and (scratch.folder / "lock").is_file()
    scratch.close()
    assert not scratch.folder.exists()
