"""Prepared sets become the right arrays, quickly the second time, and every bad set is refused in one line."""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import files
from sklearn.datasets import load_digits
from tiny_set import prepare_tiny, tiny_images

from wdkd.cache import cache_directory
from wdkd.config import DataConfig
from wdkd.data import few_shot_split, load_dataset
from wdkd.errors import UsageError
from wdkd.prepared import data_directory, find_prepared
from wdkd.subset import subset_hash

DEFAULT_CACHE = str(cache_directory())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WDKD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WDKD_CACHE_DIR", str(tmp_path_factory.mktemp("digits")))
        return load_dataset(DataConfig())


@pytest.fixture
def tiny(tiny_original, tmp_path):
    """A config for a copy of the tiny set that the test may damage."""
    shutil.copytree(tiny_original, tmp_path / "tfds")
    return DataConfig(name="tiny_set", data_dir=str(tmp_path / "tfds"), validation_size=0)


def folder(config):
    return Path(config.data_dir) / config.name / "1.2.3"


def edit_info(config, old, new):
    path = folder(config) / "dataset_info.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def assert_tiny(dataset):
    np.testing.assert_array_equal(dataset.train_images, tiny_images((12, 10, 3), 9, 9))
    np.testing.assert_array_equal(dataset.test_images, tiny_images((12, 10, 3), 6, 6))
    np.testing.assert_array_equal(dataset.train_labels, np.arange(9) % 3)
    np.testing.assert_array_equal(dataset.test_labels, np.arange(6) % 3)


def refused(config):
    """The text of the UsageError that loading must raise, within seconds and in one line."""
    start = time.monotonic()
    with pytest.raises(UsageError) as caught:
        load_dataset(config)
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)
    return str(caught.value)


def python(code, **environment):
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)


# --- digits ------------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns(digits):
    """Every image is there exactly once, with its label: value v of 16 is within rounding of v / 16 of 255."""
    images = np.concatenate([digits.train_images, digits.test_images])
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8 and images.max() == 255
    sixteenths = images[..., 0] / 255 * 16
    assert np.abs(sixteenths - sixteenths.round()).max() <= 0.5 / 255 * 16
    found = sorted((image.tobytes(), label) for image, label in zip(sixteenths.round().astype(np.uint8), labels, strict=True))
    original = load_digits()
    assert found == sorted((image.tobytes(), label) for image, label in zip(original.images.astype(np.uint8), original.target, strict=True))


def test_digits_test_split_is_stratified(digits):
    assert digits.class_names == tuple("0123456789") and digits.num_classes == 10
    assert digits.train_labels.dtype == digits.test_labels.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(digits.test_labels), [54] * 10)
    share = np.bincount(digits.test_labels) / np.bincount(load_digits().target)
    assert np.abs(share - 0.3).max() < 0.012


def test_digits_may_be_prepared_by_several_processes_at_once(digits, cache):
    code = """if True:
        import hashlib
        from wdkd.config import DataConfig
        from wdkd.data import load_dataset
        dataset = load_dataset(DataConfig())
        print(hashlib.sha256(dataset.train_images.tobytes() + dataset.test_labels.tobytes()).hexdigest())"""
    outputs = [process.communicate()[0].strip() for process in [python(code) for _ in range(3)]]
    assert outputs == [hashlib.sha256(digits.train_images.tobytes() + digits.test_labels.tobytes()).hexdigest()] * 3
    assert not list(cache.rglob(".unfinished-*"))


def test_no_tensorflow_is_imported(tiny):
    code = f"""if True:
        import sys
        from wdkd.config import DataConfig
        from wdkd.data import few_shot_split, load_dataset
        load_dataset(DataConfig(name="tiny_set", data_dir={tiny.data_dir!r}))
        few_shot_split(load_dataset(DataConfig()), DataConfig(), 0)
        print("tensorflow" in sys.modules)"""
    assert python(code).communicate()[0].strip() == "False"


# --- the few-shot split ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 10, 100, None])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_takes_the_images_it_says_and_none_of_validation(digits, n, seed):
    split = few_shot_split(digits, DataConfig(n_per_class=n, validation_size=180), seed)
    validation = few_shot_split(digits, DataConfig(n_per_class=n, validation_size=180, evaluate_on="validation"), seed)
    np.testing.assert_array_equal(split.train_images, digits.train_images[split.train_indices])
    np.testing.assert_array_equal(split.train_labels, digits.train_labels[split.train_indices])
    assert split.evaluation_split == "test" and split.evaluation_images is digits.test_images
    assert split.subset_hash == validation.subset_hash == subset_hash(split.train_indices)
    assert len(split.train_indices) == (1257 - 180 if n is None else 10 * n)
    trained, evaluated = ({image.tobytes() for image in images} for images in (split.train_images, validation.evaluation_images))
    assert not trained & evaluated
    assert validation.evaluation_split == "validation"
    np.testing.assert_array_equal(np.bincount(validation.evaluation_labels), [18] * 10)


def test_splits_are_nested_and_share_their_validation_images(digits):
    configs = [DataConfig(n_per_class=n, evaluate_on="validation") for n in (1, 5, 25, None)]
    splits = [few_shot_split(digits, config, 7) for config in configs]
    for small, large in itertools.pairwise(splits):
        assert set(small.train_indices) < set(large.train_indices)
    other = few_shot_split(digits, configs[1], 8)
    assert other.subset_hash != splits[1].subset_hash
    np.testing.assert_array_equal(other.evaluation_images, splits[1].evaluation_images)


def test_impossible_splits_are_refused(digits):
    for config, words in (
        (DataConfig(n_per_class=500), ("500", "use at most")),
        (DataConfig(validation_size=5000), ("5000", "use at most")),
        (DataConfig(validation_size=0, evaluate_on="validation"), ("validation_size is 0", "above 0")),
        (DataConfig(n_per_class=2**31 - 1), ("2147483647", "use at most")),
    ):
        with pytest.raises(UsageError) as caught:
            few_shot_split(digits, config, 0)
        assert all(word in str(caught.value) for word in words)


# --- any TFDS set ------------------------------------------------------------------------------------------------------


def test_a_users_own_set_is_loaded_by_name(tiny):
    dataset = load_dataset(tiny)
    assert_tiny(dataset)
    assert (dataset.name, dataset.version, dataset.class_names) == ("tiny_set", "1.2.3", ("ant", "bee", "cat"))
    assert dataset.image_shape == (12, 10, 3) and dataset.train_images.dtype == np.uint8
    assert few_shot_split(dataset, DataConfig(name="tiny_set", n_per_class=2, validation_size=3), 0).train_images.shape == (
        6,
        12,
        10,
        3,
    )


def test_the_environment_says_where_sets_are(tiny, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", tiny.data_dir)
    assert_tiny(load_dataset(DataConfig(name="tiny_set")))


def test_grey_images_have_a_channel_axis(tmp_path):
    prepare_tiny(tmp_path, shape=(9, 11, 1))
    dataset = load_dataset(DataConfig(name="tiny_set", data_dir=str(tmp_path)))
    np.testing.assert_array_equal(dataset.train_images, tiny_images((9, 11, 1), 9, 9))


def test_the_newest_version_is_read(tiny):
    shutil.copytree(folder(tiny), folder(tiny).parent / "1.10.0")
    (folder(tiny).parent / "2.0.0.incompleteABC").mkdir()
    (folder(tiny).parent / "3.0.0").mkdir()
    assert find_prepared("tiny_set", Path(tiny.data_dir)).name == "1.10.0"


def test_a_set_with_configurations_is_named_with_one(tiny):
    shutil.copytree(folder(tiny), folder(tiny).parent / "small" / "1.2.3")
    shutil.rmtree(folder(tiny))
    assert "tiny_set/small" in refused(tiny)
    assert_tiny(load_dataset(DataConfig(name="tiny_set/small", data_dir=tiny.data_dir)))


# --- the cache ---------------------------------------------------------------------------------------------------------


def array_folder(cache):
    (found,) = (cache / "arrays").iterdir()
    return found


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def replace_array(path, array):
    """Another array with the right digest beside it."""
    np.save(path, array)
    digests = path.parent / "sha256.json"
    values = json.loads(digests.read_text())
    values[path.stem] = hashlib.sha256(array.tobytes()).hexdigest()
    digests.write_text(json.dumps(values))


def swap(path, make):
    """Something else in place of a file."""
    path.unlink()
    make(path)


def lie(path, shape):
    """A header of another shape, of the length of the true one, before the same bytes."""
    content = path.read_bytes()
    start, end = content.index(b"("), content.index(b")") + 1
    rest = content[end:128].rstrip()
    path.write_bytes(content[:start] + shape + rest.ljust(127 - start - len(shape)) + b"\n" + content[128:])


def move_away(cache):
    """A link to the folder, in its place."""
    elsewhere = cache.parents[1] / "elsewhere"
    shutil.copytree(cache, elsewhere)
    (elsewhere / "sha256.json").unlink()
    shutil.rmtree(cache)
    cache.symlink_to(elsewhere)


DAMAGE = {
    "a pipe": lambda cache: swap(cache / "train_images.npy", os.mkfifo),
    "a pipe for digests": lambda cache: swap(cache / "sha256.json", os.mkfifo),
    "a device": lambda cache: swap(cache / "train_images.npy", lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": lambda cache: swap(cache / "train_images.npy", lambda path: path.symlink_to(path.name)),
    "a folder": lambda cache: swap(cache / "train_images.npy", lambda path: path.mkdir()),
    "a full folder": lambda cache: swap(cache / "sha256.json", lambda path: (path / "a" / "b").mkdir(parents=True)),
    "a link to another folder": move_away,
    "absurd shape": lambda cache: lie(cache / "train_images.npy", b"(1000000000000000, 3)"),
    "negative shape": lambda cache: lie(cache / "train_labels.npy", b"(-9,)"),
    "deep header": lambda cache: lie(cache / "train_labels.npy", b"(" * 60 + b")" * 60),
    "huge": lambda cache: os.truncate(cache / "train_images.npy", 2**40),
    "huge digests": lambda cache: os.truncate(cache / "sha256.json", 2**40),
    "deep digests": lambda cache: (cache / "sha256.json").write_text("[" * 4000),
    "digests of another type": lambda cache: (cache / "sha256.json").write_text('{"train_images": [], "test_images": 7}'),
    "flipped byte": lambda cache: flip_a_byte(cache / "train_images.npy"),
    "flipped label": lambda cache: flip_a_byte(cache / "test_labels.npy"),
    "cut short": lambda cache: (cache / "train_images.npy").write_bytes((cache / "train_images.npy").read_bytes()[:500]),
    "empty": lambda cache: (cache / "test_images.npy").write_bytes(b""),
    "missing": lambda cache: (cache / "train_labels.npy").unlink(),
    "pickle alone": lambda cache: (cache / "train_labels.npy").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/x'\ntR."),
    "pickled": lambda cache: np.save(cache / "train_labels.npy", np.array([{}] * 9, object), allow_pickle=True),
    "other shape": lambda cache: replace_array(cache / "train_images.npy", np.zeros((9, 12, 10, 1), np.uint8)),
    "other length": lambda cache: replace_array(cache / "train_labels.npy", np.zeros(8, np.int32)),
    "other type": lambda cache: replace_array(cache / "train_labels.npy", np.zeros(9, np.int64)),
    "no digests": lambda cache: (cache / "sha256.json").unlink(),
    "bad digests": lambda cache: (cache / "sha256.json").write_text("[1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_again(tiny, cache, damage):
    load_dataset(tiny)
    good = {path.name: path.read_bytes() for path in array_folder(cache).iterdir()}
    DAMAGE[damage](array_folder(cache))
    outside = files(cache / "elsewhere")
    start = time.monotonic()
    assert_tiny(load_dataset(tiny))
    assert time.monotonic() - start < 10 and files(cache / "elsewhere") == outside
    assert {path.name: path.read_bytes() for path in array_folder(cache).iterdir()} == good


def test_the_cache_is_what_is_read(tiny, cache):
    load_dataset(tiny)
    replace_array(array_folder(cache) / "train_images.npy", np.full((9, 12, 10, 3), 7, np.uint8))
    assert (load_dataset(tiny).train_images == 7).all()


def test_a_set_that_was_prepared_again_is_decoded_again(tiny, cache):
    load_dataset(tiny)
    replace_array(array_folder(cache) / "train_images.npy", np.full((9, 12, 10, 3), 7, np.uint8))
    os.utime(folder(tiny) / "dataset_info.json", (1, 1))
    assert_tiny(load_dataset(tiny))


def test_without_a_place_for_the_cache_sets_are_read_all_the_same(tiny, digits, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("WDKD_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert_tiny(load_dataset(tiny))
    assert "set WDKD_CACHE_DIR" in caplog.text
    np.testing.assert_array_equal(load_dataset(DataConfig()).train_images, digits.train_images)


FULL = """if True:
    import resource, signal, sys
    import numpy as np
    from wdkd.config import DataConfig
    from wdkd.data import load_dataset
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
    dataset = load_dataset(DataConfig(name=sys.argv[2], data_dir=sys.argv[3]))
    print(dataset.train_images.sum(), dataset.test_labels.sum())"""


def on_a_full_disk(limit, name, data_dir):
    """(stdout, stderr) of a process that loads a set, and cannot write files of more bytes than that."""
    done = subprocess.run([sys.executable, "-c", FULL, str(limit), name, data_dir], capture_output=True, text=True)
    assert done.returncode == 0 or "UsageError" in done.stderr, done.stderr
    return done.stdout.strip(), done.stderr


def test_a_full_disk_does_without_the_cache(tiny, cache):
    said, warned = on_a_full_disk(1000, "tiny_set", tiny.data_dir)
    assert said == f"{tiny_images((12, 10, 3), 9, 9).sum()} {(np.arange(6) % 3).sum()}"
    assert "cannot keep a cache" in warned and "Traceback" not in warned
    assert not list(cache.rglob("*.npy")) and not list(cache.rglob(".unfinished-*"))


def test_digits_that_the_cache_has_no_room_for_are_told_in_a_line(cache):
    said, warned = on_a_full_disk(1000, "digits", "")
    last = warned.strip().splitlines()[-1]
    assert not said and last.startswith("wdkd.errors.UsageError: cannot write ") and "make room there" in last
    assert not list(cache.rglob("*array_record*"))


def test_damaged_digits_are_made_again_with_a_word(cache, digits, capsys):
    load_dataset(DataConfig())
    folder = cache / "tfds" / "digits" / "1.0.0"
    shutil.rmtree(cache / "arrays")
    for change in (
        lambda: (folder / "digits-test.array_record-00000-of-00001").write_bytes(b""),
        lambda: (folder / "features.json").unlink(),
        lambda: (folder / "dataset_info.json").write_text("{"),
        lambda: (shutil.rmtree(folder), folder.symlink_to(cache)),
    ):
        change()
        np.testing.assert_array_equal(load_dataset(DataConfig()).train_images, digits.train_images)
        shutil.rmtree(cache / "arrays")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and all(
        line.startswith("note: the prepared digits in ") and line.endswith("they are made again") for line in said
    )


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_a_set_that_is_not_prepared_is_refused_at_once(tmp_path):
    text = refused(DataConfig(name="cifar10", data_dir=str(tmp_path / "none")))
    assert "'cifar10' is not prepared" in text and str(tmp_path / "none") in text
    assert "python launch/prepare_data.py --name cifar10" in text


def test_unknown_names_get_a_few_near_ones(tiny):
    text = refused(DataConfig(name="cifar01", data_dir=tiny.data_dir))
    assert "unknown data set 'cifar01'" in text and "cifar10" in text and text.count(",") < 8
    assert "did you mean 'tiny_set'" in refused(DataConfig(name="tiny_sett", data_dir=tiny.data_dir))
    odd = ("", "a b", "/tmp", "qqqqqqqqqq", "a" * 10**6, "a\0", "\ud800", "a\nb")
    for name in ("../tiny_set", "tiny_set/..", "tiny_set/.", "tiny_set/../tiny_set", *odd):
        assert "unknown data set" in refused(DataConfig(name=name, data_dir=tiny.data_dir))


def test_tfrecord_is_refused_with_the_remedy(tiny):
    edit_info(tiny, '"array_record"', '"tfrecord"')
    text = refused(tiny)
    assert "tfrecord" in text and "prepare_data.py" in text


def test_too_large_sets_are_refused(tiny):
    edit_info(tiny, '"9"', '"90000000"')
    text = refused(tiny)
    assert "90000006 images of 12x10x3" in text and "30.2 GiB" in text and "at most 2 GiB" in text


def test_sets_without_a_test_split_are_refused(tmp_path):
    prepare_tiny(tmp_path, splits=("train", "validation"))
    text = refused(DataConfig(name="tiny_set", data_dir=str(tmp_path)))
    assert "no 'test' split" in text and "train, validation" in text


def test_small_images_are_refused(tmp_path):
    prepare_tiny(tmp_path, shape=(7, 20, 3))
    text = refused(DataConfig(name="tiny_set", data_dir=str(tmp_path)))
    assert "7x20x3" in text and "at least 8x8" in text


def test_images_of_changing_size_are_refused(tmp_path):
    prepare_tiny(tmp_path, declared=(None, None, 3))
    assert "(None, None, 3)" in refused(DataConfig(name="tiny_set", data_dir=str(tmp_path)))


def test_images_unlike_the_declaration_are_refused(tmp_path):
    prepare_tiny(tmp_path, declared=(10, 12, 3))
    text = refused(DataConfig(name="tiny_set", data_dir=str(tmp_path)))
    assert "image 0 of train is 12x10x3, not 10x12x3" in text


def test_sets_of_something_else_are_refused(tmp_path):
    prepare_tiny(tmp_path, image_name="picture")
    text = refused(DataConfig(name="tiny_set", data_dir=str(tmp_path)))
    assert "picture" in text and "must have 'image' and 'label'" in text


@pytest.mark.parametrize("pattern", ["*train*", "*test*", "features.json", "dataset_info.json"])
@pytest.mark.parametrize("damage", ["cut short", "gone"])
def test_damaged_sets_are_refused(tiny, pattern, damage):
    (path,) = folder(tiny).glob(pattern)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    text = refused(tiny)
    gone = pattern == "dataset_info.json" and damage == "gone"
    assert ("unknown data set" in text) if gone else ("cannot be read" in text and "prepare_data.py" in text)


# --- real sets ---------------------------------------------------------------------------------------------------------

REAL = {
    "fashion_mnist": (
        (60000, 28, 28, 1),
        6000,
        [0.2860],
        [0.3530],
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "cifar10": (
        (50000, 32, 32, 3),
        5000,
        [0.4914, 0.4822, 0.4465],
        [0.2470, 0.2435, 0.2616],
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
}
"""Shape, images per class, published mean and standard deviation of each channel in [0, 1], and class names."""


@pytest.fixture(params=REAL)
def real(request, monkeypatch):
    """Real sets keep the user's own cache: decoding them takes up to a minute."""
    data_dir = data_directory(None)
    if find_prepared(request.param, data_dir) is None:
        pytest.skip(
            f"{request.param} is not prepared in {data_dir}; set TFDS_DATA_DIR, or run launch/prepare_data.py --name {request.param}"
        )
    monkeypatch.setenv("WDKD_CACHE_DIR", DEFAULT_CACHE)
    return load_dataset(DataConfig(name=request.param))


@pytest.mark.timeout(600)
def test_real_sets_are_what_was_published(real):
    shape, per_class, means, deviations, class_names = REAL[real.name]
    assert real.train_images.shape == shape and real.test_images.shape == (10000, *shape[1:])
    assert real.class_names == class_names
    np.testing.assert_array_equal(np.bincount(real.train_labels), [per_class] * 10)
    np.testing.assert_array_equal(np.bincount(real.test_labels), [1000] * 10)
    # Sums of integers, so that nothing is lost over 50 million pixels and little memory is used.
    counts = np.stack([np.bincount(real.train_images[..., channel].ravel(), minlength=256) for channel in range(shape[-1])])
    shares, values = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = shares @ values
    np.testing.assert_allclose(mean, means, atol=6e-5)
    np.testing.assert_allclose(np.sqrt(shares @ values**2 - mean**2), deviations, atol=6e-5)
    split = few_shot_split(real, DataConfig(name=real.name, n_per_class=50, validation_size=5000), 0)
    np.testing.assert_array_equal(np.bincount(split.train_labels), [50] * 10)
