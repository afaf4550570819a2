"""launch/prepare_data.py: what it refuses, and how fast; and that it leaves alone what is prepared."""

import importlib.util
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

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


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="tensorflow is installed, so nothing is missing")
def test_without_tensorflow_it_names_the_extra(offline, tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"")
    text = refused("--name", "cifar10", "--data-dir", tmp_path / "sets", "--archive", tmp_path / "cifar-10-binary.tar.gz")
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


def test_an_archive_of_several_files_needs_them_all(script, offline, tmp_path):
    builder_cls = tfds.builder_cls("mnist")
    files = [info.filename for info in builder_cls.url_infos.values()]
    for file in files[:-1]:
        (tmp_path / file).write_bytes(b"")
    text = message(script.require_files, builder_cls, "mnist", tmp_path, tmp_path / files[0])
    assert files[-1] in text and files[0] not in text
    (tmp_path / files[-1]).write_bytes(b"")
    script.require_files(builder_cls, "mnist", tmp_path, tmp_path / files[0])


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
