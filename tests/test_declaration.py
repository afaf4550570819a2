"""A prepared set's JSON files cannot make TFDS import, read elsewhere, wait, or fill the memory."""

import functools
import json
import os
import sys

import pytest
from tiny_set import load_tiny as load
from tiny_set import refused_tiny

FEATURE = "tensorflow_datasets.core.features"


refused = functools.partial(refused_tiny, seconds=10, words="tiny_set")


@pytest.fixture
def folder(tiny_folder):
    return tiny_folder


def edit(folder, file, change):
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).write_text(json.dumps(value))


# --- classes ------------------------------------------------------------------------------------------------------------

EVIL = "evil_module.Evil"
DICTIONARY = f"{FEATURE}.features_dict.FeaturesDict"


def legacy(name, content):
    return {"type": name, "content": content, "proto_cls": ""}


def nested(name):
    """A feature that is told in a string, in a string."""
    inner = json.dumps({"feature": json.dumps({"pythonClassName": name})})
    return {"pythonClassName": f"{FEATURE}.sequence_feature.Sequence", "jsonFeature": {"json": inner}}


def put(feature):
    def change(value):
        value["featuresDict"]["features"]["other"] = feature

    return change


CLASSES = {
    "a feature": put({"pythonClassName": EVIL, "jsonFeature": {"json": "{}"}}),
    "protobuf's own spelling": put({"python_class_name": EVIL, "json_feature": {"json": "{}"}}),
    "in a string": put(nested(EVIL)),
    "the whole": lambda value: value.update(pythonClassName=EVIL),
    "as files were once": lambda value: (value.clear(), value.update(legacy(DICTIONARY, {"x": legacy(EVIL, {})}))),
    "content in a string": lambda value: (
        value.clear(),
        value.update(
            {
                "type": DICTIONARY,
                "content": json.dumps({"features": {"x": {"pythonClassName": EVIL}}}),
                "proto_cls": "tensorflow_datasets.FeaturesDict",
            }
        ),
    ),
}


@pytest.mark.parametrize("change", CLASSES.values(), ids=CLASSES)
def test_no_module_that_a_set_names_is_imported(folder, tmp_path, monkeypatch, change):
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'was here')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    edit(folder, "features.json", change)
    text = refused(folder)
    assert not (tmp_path / "was here").exists() and "evil_module" not in sys.modules
    assert "a feature's class is" in text and "one of TFDS's own" in text


def test_nor_where_the_description_has_the_features(folder, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'was here')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    edit(folder, "dataset_info.json", lambda value: value.update(features={"pythonClassName": EVIL, "jsonFeature": {"json": "{}"}}))
    assert "one of TFDS's own" in refused(folder)
    assert not (tmp_path / "was here").exists()


def test_features_of_tfds_are_read(folder):
    edit(folder, "features.json", put({"pythonClassName": f"{FEATURE}.tensor_feature.Tensor", "tensor": {"dtype": "int64", "shape": {}}}))
    edit(folder, "features.json", put({"pythonClassName": f"{FEATURE}.text_feature.Text", "text": {}, "description": '{"type": "of text"'}))
    assert load(folder).num_classes == 3


# --- what it reads ------------------------------------------------------------------------------------------------------


def test_names_of_labels_are_read_from_no_file_that_a_set_names(folder):
    label = legacy(f"{FEATURE}.class_label_feature.ClassLabel", {"names_file": "/dev/zero"})
    image = legacy(f"{FEATURE}.image_feature.Image", {"shape": [12, 10, 3], "dtype": "uint8", "encoding_format": "png"})
    (folder / "features.json").write_text(json.dumps(legacy(DICTIONARY, {"label": label, "image": image})))
    assert "names_file is '/dev/zero'" in refused(folder).replace("\\", "")


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json", "label.labels.txt", "other.labels.txt"])
@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path.name), lambda path: path.mkdir()]
)
def test_what_is_no_file_is_refused_at_once(folder, file, make):
    (folder / file).unlink(missing_ok=True)
    make(folder / file)
    text = refused(folder)
    # Without a description there is no set.
    assert "cannot be read" in text or (file == "dataset_info.json" and "unknown data set" in text)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json", "label.labels.txt"])
def test_huge_files_are_refused(folder, file):
    with open(folder / file, "r+b") as opened:
        opened.truncate(2**40)
    assert "at most 4,194,304 are read" in refused(folder)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "7", '"text"', "null", "{}", "\0", "\ud800", "1" * 10_000])
def test_json_of_other_kinds_is_refused(folder, file, text):
    (folder / file).write_text(text, errors="surrogatepass")
    assert "cannot be read" in refused(folder)


# --- what it says -------------------------------------------------------------------------------------------------------


def splits(change):
    return lambda value: change(value["splits"][0])


SAYINGS = {
    "path in the name": (lambda value: value.update(name="../../x"), "name is '../../x'"),
    "path in a split": (splits(lambda split: split.update(name="../train")), "a split's name is"),
    "path in a template": (splits(lambda split: split.update(filepathTemplate="../../{SPLIT}")), "filepath_template is"),
    "absolute template": (splits(lambda split: split.update(filepath_template="/dev/zero", filepathTemplate="")), "cannot be read"),
    "width in a template": (splits(lambda split: split.update(filepathTemplate="{SPLIT:>9999999999}")), "filepath_template is"),
    "attribute in a template": (splits(lambda split: split.update(filepathTemplate="{SPLIT.__class__}")), "filepath_template is"),
    "unknown field": (splits(lambda split: split.update(filepathTemplate="{OTHER}-{SPLIT}")), "cannot be read"),
    "many shards": (splits(lambda split: split.update(shardLengths=["0"] * 10_001)), "number of shards is 10001"),
    "absurd count": (splits(lambda split: split.update(shardLengths=["1000000000000000"])), "at most 2 GiB fit"),
    "too large a count": (splits(lambda split: split.update(shardLengths=["10" * 20])), "cannot be read"),
    "negative count": (splits(lambda split: split.update(shardLengths=["-9", "18"])), "shard_lengths is -9"),
    "text for a count": (splits(lambda split: split.update(shardLengths=["nine"])), "cannot be read"),
    "wrong count": (splits(lambda split: split.update(shardLengths=["8"])), "9 records in a file of 8"),
    "version": (lambda value: value.update(version="../1.2.3"), "version is"),
    "no version": (lambda value: value.update(version=""), "version is"),
    "format": (lambda value: value.update(fileFormat="pickle"), "cannot be read"),
    "control characters": (lambda value: value.update(name="\x1b[2J\n"), "name is"),
}


@pytest.mark.parametrize("saying", SAYINGS)
def test_absurd_descriptions_are_refused(folder, saying):
    change, text = SAYINGS[saying]
    edit(folder, "dataset_info.json", change)
    assert text in refused(folder)


def image(**changes):
    return lambda value: value["featuresDict"]["features"]["image"]["image"].update(changes)


def classes(count):
    return lambda value: value["featuresDict"]["features"]["label"]["classLabel"].update(numClasses=count)


FEATURES = {
    "huge images": (image(shape={"dimensions": ["1000000000", "1000000000", "3"]}), "at most 2 GiB fit"),
    "sizes that overflow": (image(shape={"dimensions": ["4294967296", "4294967296", "1"]}), "at most 2 GiB fit"),
    "negative sizes": (image(shape={"dimensions": ["-8", "8", "3"]}), "cannot be read"),
    "no sizes": (image(shape={"dimensions": ["-1", "-1", "3"]}), "choose a set of uint8 images of one size"),
    "many axes": (image(shape={"dimensions": ["8"] * 40_000}), "choose a set of uint8 images of one size"),
    "another type": (image(dtype="object"), "cannot be read"),
    "a type of types": (image(dtype="(1000000000,)f8"), "cannot be read"),
    "many classes": (classes("1000000000000"), "1000000000000 classes; there must be 1 to 2,000"),
    "no classes": (classes("0"), "0 classes"),
    "fewer classes": (classes("2"), "labels from 0 to 2 in train; they must be below 2"),
    "no image": (lambda value: value["featuresDict"]["features"].pop("image"), "must have 'image' and 'label'"),
    "many features": (
        lambda value: value["featuresDict"]["features"].update({f"f{i}": value["featuresDict"]["features"]["file"] for i in range(5000)}),
        None,
    ),
}


@pytest.mark.parametrize("name", FEATURES)
def test_absurd_features_are_refused(folder, name):
    change, text = FEATURES[name]
    edit(folder, "features.json", change)
    (folder / "label.labels.txt").unlink()
    if text is None:
        load(folder)
    else:
        assert text in refused(folder)
