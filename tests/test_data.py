"""Where the real data are looked for, and what is fetched from an address: here a folder that this machine serves."""

import hashlib
import logging
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from benchmarks import data
from benchmarks.adaptation import real

pytestmark = [pytest.mark.engine_independent, pytest.mark.cpu_only]

NAME, CONTENT = "uci/yacht/data.csv.gz", b"not quite a yacht"


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch, tmp_path):
    monkeypatch.delenv(data.VARIABLE, raising=False)
    monkeypatch.setenv(data.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(data, "DEFAULT_FOLDER", tmp_path / "nowhere")


# Folders.


def test_a_folder_is_passed_or_named_or_beside_the_repository(tmp_path, monkeypatch):
    (tmp_path / "file.npz").touch()
    assert data.folder_with("file.npz", "", str(tmp_path)) == tmp_path
    monkeypatch.setattr(data, "DEFAULT_FOLDER", tmp_path)
    assert data.folder_with(["file.npz"], "") == tmp_path
    monkeypatch.setenv(data.VARIABLE, str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match=r"no file.npz in .*elsewhere"):
        data.folder_with("file.npz", "")
    assert data.folder_with("file.npz", "", tmp_path) == tmp_path


def test_what_is_missing_is_named_with_where_to_get_it(tmp_path):
    (tmp_path / "there").touch()
    expected = r"^The data are not here: no one and no other in .*\. Make them\. NTK_GP_DATA names the folder"
    with pytest.raises(FileNotFoundError, match=expected):
        data.folder_with(["one", "there", "other"], "Make them.", tmp_path)


# Addresses.


@pytest.fixture
def served(tmp_path):
    """A folder with one file, its address, and the paths that were asked for."""
    pooch = pytest.importorskip("pooch", reason="the extra 'data' is not installed")
    pooch.get_logger().setLevel(logging.WARNING)
    file = tmp_path / "served" / NAME
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENT)
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "served"))
    thread = Thread(target=partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    yield file, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setitem(data.SHA256, NAME, hashlib.sha256(CONTENT).hexdigest())


def test_a_file_is_fetched_once(served, known, tmp_path, monkeypatch):
    _, address, asked = served
    folder = data.folder_with(NAME, "", address)
    assert folder == tmp_path / "cache" and (folder / NAME).read_bytes() == CONTENT
    monkeypatch.setenv(data.VARIABLE, address + "/")
    assert data.folder_with([NAME], "") == folder
    assert asked == [f"/{NAME}"]
    (folder / NAME).write_bytes(b"spoilt")  # what the cache has is checked as well
    assert (data.folder_with(NAME, "") / NAME).read_bytes() == CONTENT
    assert asked == 2 * [f"/{NAME}"]


def test_another_file_is_refused_and_not_kept(served, tmp_path):
    _, address, _ = served
    with pytest.raises(ValueError, match=rf"{address}/{NAME} is another file .*expected {data.SHA256[NAME]}"):
        data.folder_with(NAME, "", address)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_what_cannot_be_fetched_says_why(served, known):
    file, address, asked = served
    with pytest.raises(FileNotFoundError, match=r"ORL_faces is not among what can be fetched .* Get them\."):
        data.folder_with("ORL_faces", "Get them.", address)
    assert asked == []
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{address}/{NAME} could not be fetched \(404.* Get it\."):
        data.folder_with(NAME, "Get it.", address)


def test_without_pooch_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(FileNotFoundError, match=r"The data are not here: .* pip install pooch"):
        data.folder_with(NAME, "", "https://example.org/data")


def test_all_that_the_benchmarks_read_can_be_fetched():
    sets = {name.split("/")[1] for name in data.SHA256 if name.startswith("uci/")}
    both = {f"uci/{name}/{file}" for name in sets for file in ("data.csv.gz", "test_mask.csv.gz")}
    assert both | {data.MALARIA, data.PRECIPITATION} == set(data.SHA256)
    assert set(real.FILES) < set(data.SHA256)
    assert all(len(digest) == 64 for digest in data.SHA256.values())
