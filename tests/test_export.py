"""Downloads that stop and go on, and deploy folders that are finished or not there."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from deploy_models import save_adapter, save_base
from download_double import FileServer, ServiceDouble
from loopback import serving
from safetensors import SafetensorError

from course_lib import files as course_files
from course_lib.errors import CourseError
from course_lib.export import download as download_module
from course_lib.export import fetch as fetch_module
from course_lib.export import versions
from course_lib.export.download import download_adapter
from course_lib.export.files import safe_path, write_json, write_tensors

TRAINED = "tinker://run:train:0/weights/final"
SAMPLER = "tinker://run:train:0/sampler_weights/final"
GIVEN = "tinker://run:train:0/external_weights/given"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("export") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_adapter(tmp_path_factory.mktemp("export") / "adapter", base)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


@pytest.fixture
def files(adapter: Path) -> FileServer:
    return FileServer(adapter)


@pytest.fixture
def service(files: FileServer, adapter: Path, base: Path):
    with serving(files.app()) as url:
        yield ServiceDouble(url, adapter, "course/base", base)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(sleep=lambda seconds: None, time_ns=time.time_ns)
    monkeypatch.setattr(download_module, "time", clock)  # other threads still sleep


def same_files(found: Path, wanted: Path) -> bool:
    names = sorted(path.name for path in found.iterdir())
    return names == sorted(path.name for path in wanted.iterdir()) and all(
        (found / name).read_bytes() == (wanted / name).read_bytes() for name in names
    )


@pytest.mark.parametrize("checkpoint", [TRAINED, SAMPLER, GIVEN])
def test_every_kind_of_checkpoint_is_fetched_whole(tmp_path, service, adapter, checkpoint):
    got = download_adapter(service, checkpoint, tmp_path / "d")
    assert same_files(got.folder, adapter)
    assert got.base_model == "course/base"
    assert sorted(got.files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (got.probe is None) == (checkpoint == GIVEN)


def test_the_temporary_export_is_deleted_and_a_given_one_is_not(tmp_path, service):
    download_adapter(service, TRAINED, tmp_path / "a")
    assert service.deleted == list(service.exports)
    service.deleted.clear()
    download_adapter(service, GIVEN, tmp_path / "b")
    assert service.deleted == []


def test_a_connection_that_breaks_is_continued_where_it_broke(tmp_path, service, files, adapter):
    files.cut_after = 5000
    service.names = ["adapter_model.safetensors"]
    got = download_adapter(service, TRAINED, tmp_path / "d")
    assert files.seen[1] == ("adapter_model.safetensors", "bytes=5000-")
    name = "adapter_model.safetensors"
    assert (got.folder / name).read_bytes() == (adapter / name).read_bytes()


def test_a_server_without_ranges_is_asked_from_the_start(tmp_path, service, files, adapter):
    files.cut_after, files.ranges = 5000, False
    service.names = ["adapter_model.safetensors"]
    got = download_adapter(service, TRAINED, tmp_path / "d")
    name = "adapter_model.safetensors"
    assert (got.folder / name).read_bytes() == (adapter / name).read_bytes()


def test_a_file_that_changed_meanwhile_is_not_glued_to_its_old_start(
    tmp_path, files, adapter, base, monkeypatch
):
    monkeypatch.setattr(download_module, "ATTEMPTS", 1)
    source = tmp_path / "source"
    shutil.copytree(adapter, source)
    files.folder, files.cut_after = source, 5000
    with serving(files.app()) as url:
        service = ServiceDouble(url, source, "course/base", base)
        service.names = ["adapter_model.safetensors"]
        with pytest.raises(CourseError, match="broke off"):
            download_adapter(service, TRAINED, tmp_path / "d")
        other = save_adapter(tmp_path / "other", base, seed=5)
        shutil.copy(other / "adapter_model.safetensors", source)
        got = download_adapter(service, TRAINED, tmp_path / "d")
    name = "adapter_model.safetensors"
    assert (got.folder / name).read_bytes() == (other / name).read_bytes()


def test_a_body_whose_hash_is_not_the_announced_one_is_never_kept(tmp_path, service, files):
    files.digest = "A" * 43 + "="
    with pytest.raises(CourseError, match="hash is not the one the server announced"):
        download_adapter(service, TRAINED, tmp_path / "d")
    assert not list((tmp_path / "d" / "files").glob("*.safetensors"))


def test_an_expired_url_is_signed_anew(tmp_path, service, files, adapter):
    files.statuses = [403, 503]
    got = download_adapter(service, TRAINED, tmp_path / "d")
    assert same_files(got.folder, adapter)


def test_a_refused_file_is_one_sentence(tmp_path, service, files):
    files.statuses = [404]
    with pytest.raises(CourseError, match=r"adapter_config\.json: the download is refused \(404\)"):
        download_adapter(service, TRAINED, tmp_path / "d")


def test_a_second_call_fetches_nothing_again(tmp_path, service, files):
    first = download_adapter(service, TRAINED, tmp_path / "d")
    count = len(files.seen)
    assert download_adapter(service, TRAINED, tmp_path / "d") == first
    assert len(files.seen) == count


def test_a_file_damaged_since_is_fetched_again(tmp_path, service, files, adapter):
    got = download_adapter(service, TRAINED, tmp_path / "d")
    (got.folder / "adapter_config.json").write_text("{}")
    again = download_adapter(service, TRAINED, tmp_path / "d")
    assert same_files(again.folder, adapter)


def test_an_export_that_expired_between_two_calls_is_made_anew(
    tmp_path, service, files, adapter, monkeypatch
):
    monkeypatch.setattr(download_module, "ATTEMPTS", 1)
    files.statuses = [503]
    with pytest.raises(CourseError, match="broke off"):
        download_adapter(service, TRAINED, tmp_path / "d")
    service.exports.clear()
    got = download_adapter(service, TRAINED, tmp_path / "d")
    assert same_files(got.folder, adapter) and len(service.exports) == 1


def test_a_folder_of_another_checkpoint_is_not_mixed_in(tmp_path, service):
    download_adapter(service, TRAINED, tmp_path / "d")
    with pytest.raises(CourseError, match=f"holds a download of {TRAINED}"):
        download_adapter(service, SAMPLER, tmp_path / "d")


def test_a_service_that_loads_no_sampler_checkpoint_points_to_the_training_one(tmp_path, service):
    service.refuse_sampler = True
    with pytest.raises(CourseError, match="deploy the training checkpoint of the same step"):
        download_adapter(service, SAMPLER, tmp_path / "d")


@pytest.mark.parametrize("path", ["runs/x", "tinker://a/b", "tinker://a/other/b", ""])
def test_what_is_no_checkpoint_path_is_said_so(tmp_path, service, path):
    with pytest.raises(CourseError, match="is not a checkpoint path"):
        download_adapter(service, path, tmp_path / "d")


def test_a_checkpoint_that_is_not_there_is_the_services_own_sentence(tmp_path, service):
    with pytest.raises(CourseError, match="there is no such checkpoint"):
        download_adapter(service, "tinker://run:train:0/weights/missing", tmp_path / "d")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "C:\\x", "", "a\0b", "a//b", "."])
def test_a_file_name_cannot_leave_the_folder(tmp_path, service, name):
    with pytest.raises(CourseError, match="leads out of the folder"):
        safe_path(tmp_path, name, "place")
    if name and "\0" not in name:
        path = "tinker://run:train:0/external_weights/given"
        service.exports[path] = {name: f"{service.url}/files/adapter_config.json"}
        with pytest.raises(CourseError, match="leads out of the folder"):
            download_adapter(service, path, tmp_path / "d")


# --- a full disk ---------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is written fits."""

    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(path: Path, mode: str):
        return Full() if "r" not in mode else open(path, mode)

    monkeypatch.setattr(fetch_module, "open", full, raising=False)
    monkeypatch.setattr(course_files, "open", full, raising=False)


def test_a_full_disk_names_the_file_that_does_not_fit(tmp_path, full_disk):
    """`this machine: No space left on device`, said the command line."""
    with pytest.raises(OSError) as caught:
        write_json(tmp_path / "download.json", {})
    assert (caught.value.errno, caught.value.filename) == (
        errno.ENOSPC,
        str(tmp_path / "download.json"),
    )


def test_a_full_disk_names_the_file_that_is_fetched(tmp_path, files, full_disk, monkeypatch):
    monkeypatch.setattr(fetch_module, "write_whole", lambda path, data: None)
    with serving(files.app()) as url, pytest.raises(OSError) as caught:
        fetch_module.fetch(f"{url}/files/adapter_model.safetensors", tmp_path / "adapter")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "adapter"))


def test_tensors_that_do_not_fit_on_the_disk_are_one_sentence(tmp_path, monkeypatch):
    def full(tensors: dict, path: Path, metadata: dict) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CourseError, match=r"model\.safetensors: cannot be written \(I/O error"):
        write_tensors(tmp_path / "model.safetensors", {})


# --- versions ------------------------------------------------------------------------------------


def finished(tmp_path: Path, out: Path, text: str) -> Path:
    folder = tmp_path / "build"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps({"text": text}))
    (folder / "model" / "config.json.tmp").write_text("left by a kill")
    version = versions.finish_version(folder, versions.next_version(out), {"key": text})
    versions.use_version(out, version)
    return version


def test_a_version_is_finished_by_one_rename_and_then_current(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    first = finished(tmp_path, out, "a")
    second = finished(tmp_path, out, "b")
    assert (first.name, second.name) == ("v1", "v2")
    assert versions.current_version(out) == second
    assert versions.find_version(out, "a") == first
    assert versions.model_folder(out) == second / "model"
    assert versions.model_folder(second / "model") == second / "model"
    versions.check_version(second)
    assert not list(out.rglob("*.tmp"))


def test_rollback_goes_one_version_back_and_deletes_nothing(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for text in "abc":
        finished(tmp_path, out, text)
    assert versions.rollback(out).name == "v2"
    assert versions.rollback(out).name == "v1"
    assert versions.current_version(out).name == "v1"
    with pytest.raises(CourseError, match="v1 is the first version"):
        versions.rollback(out)
    assert finished(tmp_path, out, "d").name == "v4"


def test_a_version_whose_files_changed_is_told(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    version = finished(tmp_path, out, "a")
    (version / "model" / "config.json").write_text("{}")
    with pytest.raises(CourseError, match="is not the file that was verified"):
        versions.check_version(version)


@pytest.mark.parametrize("held", ["[]", '"v1"', "null", "{"])
def test_a_current_file_that_is_no_json_object_is_told_with_what_to_do(tmp_path, held):
    """`AttributeError: 'list' object has no attribute 'get'`, said serve and rollback."""
    out = tmp_path / "out"
    out.mkdir()
    finished(tmp_path, out, "a")
    (out / "current.json").write_text(held)
    for use in (versions.current_version, versions.rollback):
        with pytest.raises(
            CourseError, match=r"current\.json: not .* or run posttrain deploy again"
        ):
            use(out)


def test_a_record_that_is_no_json_object_is_told_with_what_to_do(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    version = finished(tmp_path, out, "a")
    (version / "deploy.json").write_text("[]")
    words = r"deploy\.json: not a JSON object.*or delete .*v1 and run posttrain deploy again"
    with pytest.raises(CourseError, match=words):
        versions.find_version(out, "a")
    with pytest.raises(CourseError, match=words):
        versions.check_version(version)


def test_a_folder_without_a_finished_version_is_told_from_an_empty_one(tmp_path):
    with pytest.raises(CourseError, match="nothing is deployed here"):
        versions.current_version(tmp_path)
    (tmp_path / ".work").mkdir()
    with pytest.raises(CourseError, match="was begun here and not finished"):
        versions.current_version(tmp_path)
    (tmp_path / "current.json").write_text(json.dumps({"version": "../elsewhere"}))
    with pytest.raises(CourseError, match="is not a finished version"):
        versions.current_version(tmp_path)
