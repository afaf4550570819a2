"""launch/prepare_data.py: what it refuses, and how fast; and that it leaves alone what is prepared."""

import hashlib
import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from PIL import Image

from wdkd.errors import UsageError
from wdkd.prepared import data_directory, find_prepared

SCRIPT = Path(__file__).parent.parent / "launch" / "prepare_data.py"
CLOSED = "http://127.0.0.1:9"
"""A proxy that refuses every connection, so that tests are offline wherever they run."""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare_data"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["prepare_data"]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, CLOSED)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WDKD_CACHE_DIR", str(tmp_path / "cache"))


def run(*arguments):
    """The finished process, known to have taken seconds: 4 on an idle machine, of which imports take most."""
    start = time.monotonic()
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    assert time.monotonic() - start < 40
    return process


def refused(*arguments):
    """What the script says on its only line of error output; it must exit with code 2."""
    process = run(*arguments)
    assert process.returncode == 2, process.stderr
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1, process.stderr
    return process.stderr


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


# --- the command line --------------------------------------------------------------------------------------------------


def test_offline_it_fails_fast_and_says_what_to_do(offline, tmp_path):
    text = refused("--name", "cifar10", "--data-dir", tmp_path / "sets")
    assert "www.cs.toronto.edu" in text and "cifar-10-binary.tar.gz" in text and "--archive" in text
    assert not (tmp_path / "sets").exists()


def test_digits_are_prepared_without_network_or_tensorflow(offline, tmp_path):
    process = run("--name", "digits")
    assert process.returncode == 0, process.stderr
    assert str(tmp_path / "cache") in process.stdout
    assert (tmp_path / "cache" / "tfds" / "digits" / "1.0.0" / "dataset_info.json").exists()


def test_unknown_names_are_refused(offline, tmp_path):
    assert "did you mean 'mnist'" in refused("--name", "mnits", "--data-dir", tmp_path)


def test_damaged_digits_are_prepared_again(script, offline, tmp_path, capsys):
    script.main(script.Arguments(name=("digits",)))
    folder = tmp_path / "cache" / "tfds" / "digits" / "1.0.0"
    good = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}
    (folder / "digits-train.array_record-00000-of-00001").write_bytes(b"random bytes" * 1000)
    for path in (tmp_path / "cache" / "arrays").rglob("*.npy"):
        path.unlink()
    script.main(script.Arguments(name=("digits",)))
    said = capsys.readouterr()
    assert said.out.count("digits is prepared in") == 2
    assert said.err.count("\n") == 1 and "are damaged" in said.err and "they are made again" in said.err
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"} == good


def test_a_folder_is_prepared_and_counted(script, offline, tmp_path, capsys):
    for place, count in {"кот": 3, "[dog]": 2, "test/кот": 1, "test/[dog]": 4}.items():
        (tmp_path / "photos" / place).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20, 30), (number, 50, 9)).save(tmp_path / "photos" / place / f"{number}.jpg")
    script.main(script.Arguments(name=(), folder=str(tmp_path / "photos"), image_size=(16, 24)))
    words = re.sub(r"[^\w\[\]:]+", " ", capsys.readouterr().out)
    assert "photos: images of 16x24x3 class training test [dog] 2 4 кот 3 1 all 5 5" in words
    (tmp_path / "none").mkdir()
    Image.new("L", (20, 30)).save(tmp_path / "none" / "a.png")
    Image.new("L", (30, 20)).save(tmp_path / "none" / "b.png")
    script.main(script.Arguments(name=(), folder=str(tmp_path / "none"), test_share=0.5))
    words = re.sub(r"[^\w()\[\]:]+", " ", capsys.readouterr().out)
    assert "none: images of 32x32x1 class training test (no label) 1 1 all 1 1" in words


def test_options_of_the_two_kinds_of_sets_do_not_mix(script, tmp_path):
    for options in ({"name": ("digits",)}, {"data_dir": "x"}, {"archive": Path("x")}):
        assert "give one of them" in message(script.main, script.Arguments(**{"name": ()} | options, folder=str(tmp_path)))
    assert "data.channels is for images of your own" in message(script.main, script.Arguments(name=("digits",), channels=1))
    assert "data.test_share is 0; it must be between" in message(script.main, script.Arguments(name=(), folder="x", test_share=0))
    assert "holds no images" in message(script.main, script.Arguments(name=(), folder=str(tmp_path)))


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="tensorflow is installed, so nothing is missing")
def test_without_tensorflow_it_names_the_extra(script, offline, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "require_files", lambda *given: None)
    text = message(script.main, script.Arguments(name=("cifar10",), data_dir=str(tmp_path)))
    assert "needs tensorflow" in text and "pip install -e '.[prepare]'" in text


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_what_is_prepared_is_left_alone(script, name, offline, capsys):
    directory = find_prepared(name, data_directory(None))
    if directory is None:
        pytest.skip(f"{name} is not prepared in {data_directory(None)}; set TFDS_DATA_DIR, or run launch/prepare_data.py --name {name}")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in directory.iterdir())
    script.main(script.Arguments(name=(name,)))
    assert f"{name} is prepared in {directory}" in capsys.readouterr().out
    assert sorted((path.name, path.stat().st_mtime_ns) for path in directory.iterdir()) == before


# --- arguments ---------------------------------------------------------------------------------------------------------


def message(function, *arguments):
    with pytest.raises(UsageError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_arguments_that_do_not_fit_are_refused(script, offline, tmp_path):
    assert "no data set named" in message(script.main, script.Arguments(name=()))
    both = script.Arguments(name=("mnist", "cifar10"), archive=tmp_path / "x")
    assert "one data set" in message(script.main, both)


def test_archives_that_do_not_fit_are_refused(script, offline, tmp_path):
    arguments = script.Arguments(name=("cifar10",), data_dir=str(tmp_path / "sets"), archive=tmp_path / "cifar.tar.gz")
    assert "does not exist" in message(script.main, arguments)
    arguments.archive.write_bytes(b"")
    text = message(script.main, arguments)
    assert "'cifar.tar.gz' is not a file of 'cifar10'" in text and "cifar-10-binary.tar.gz" in text


CONTENT = {"a.gz": b"first", "b.gz": b"the second"}


class Published:
    """A set of two files, as its builder's class describes them."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = None
    url_infos = {
        f"{CLOSED}/{name}": tfds.download.checksums.UrlInfo(len(content), hashlib.sha256(content).hexdigest(), name)
        for name, content in CONTENT.items()
    }


class ByHand(Published):
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Fetch c.tar."
    url_infos = None


@pytest.fixture
def downloaded(tmp_path):
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    return folder


def test_an_archive_of_several_files_needs_them_all(script, offline, downloaded, tmp_path):
    script.require_files(Published, "pair", tmp_path, downloaded / "a.gz")
    (downloaded / "b.gz").unlink()
    text = message(script.require_files, Published, "pair", tmp_path, downloaded / "a.gz")
    assert "cannot reach" in text and "b.gz" in text


SWAPS = {
    "flipped": (lambda path: path.write_bytes(b"The second"), "has SHA-256 "),
    "longer": (lambda path: path.write_bytes(b"the second one"), "has 14 bytes; the published file has 10"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "is no regular file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is no regular file|Is a directory"),
    "a device": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "is no regular file"),
    "a link to another": (lambda path: (path.unlink(), path.symlink_to("a.gz")), "has 5 bytes"),
}


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("given", ["a.gz", "b.gz"])
def test_a_file_that_is_not_the_published_one_is_never_opened_by_tfds(script, offline, downloaded, tmp_path, monkeypatch, swap, given):
    monkeypatch.setattr(script, "download", lambda *given: pytest.fail("TFDS was called"))
    monkeypatch.setattr(tfds, "builder_cls", lambda name: Published)
    change, text = SWAPS[swap]
    change(downloaded / "b.gz")
    start = time.monotonic()
    said = message(script.main, script.Arguments(name=("mnist",), data_dir=str(tmp_path / "sets"), archive=downloaded / given))
    assert time.monotonic() - start < 10
    assert re.search(f"b.gz.* ({text}|does not exist, or is no file)", said), said


def test_a_link_to_the_published_file_will_do(script, offline, downloaded, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in CONTENT:
        (elsewhere / name).symlink_to(downloaded / name)
    script.require_files(Published, "pair", tmp_path, elsewhere / "a.gz")
    assert script.folder_of(elsewhere / "a.gz") == elsewhere


def test_of_a_set_that_is_fetched_by_hand_everything_in_the_folder_is_looked_at(script, offline, downloaded, tmp_path):
    (downloaded / "c.csv").write_text("1,2\n")
    (downloaded / "a.gz").unlink()
    (downloaded / "b.gz").unlink()
    script.require_files(ByHand, "hand", tmp_path, downloaded / "c.csv")
    os.mkfifo(downloaded / "c.fifo")
    text = message(script.require_files, ByHand, "hand", tmp_path, downloaded / "c.csv")
    assert "c.fifo is neither a file nor a folder" in text and "a folder of their own" in text


def test_sets_that_must_be_fetched_by_hand_say_how(script, offline, tmp_path):
    text = message(script.main, script.Arguments(name=("imagenet2012",), data_dir=str(tmp_path)))
    assert "by hand" in text and "--archive" in text and "ILSVRC2012_img_train.tar" in text


def test_a_data_dir_that_cannot_be_written_is_refused(script, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in message(script.require_writable, tmp_path / "file" / "sets")
    script.require_writable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


# --- reachability ------------------------------------------------------------------------------------------------------


@pytest.fixture
def direct(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_a_host_that_answers_is_reachable_even_among_others(script, direct, listener):
    assert script.any_reachable([f"{listener}/file.gz"])
    assert script.any_reachable([f"{CLOSED}/a", f"{listener}/file.gz", "http://does-not-exist.invalid/b"])


def test_hosts_that_do_not_answer_are_not_waited_for(script, direct):
    start = time.monotonic()
    # 192.0.2.0/24 is reserved for documentation: packets to it are lost or refused.
    assert not script.any_reachable([f"{CLOSED}/a", "http://192.0.2.1/b", "http://does-not-exist.invalid/c"], seconds=1.0)
    assert time.monotonic() - start < 4


def test_a_proxy_is_what_must_answer(script, direct, listener, monkeypatch):
    monkeypatch.setenv("https_proxy", listener)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert script.any_reachable(["https://does-not-exist.invalid/file.gz"])
    monkeypatch.setenv("https_proxy", CLOSED)
    assert not script.any_reachable(["https://does-not-exist.invalid/file.gz"])
