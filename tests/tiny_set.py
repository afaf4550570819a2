"""A small prepared set of random images, as a user's own builder makes it."""

import io
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from wdkd.config import DataConfig
from wdkd.data import load_dataset
from wdkd.errors import UsageError


def tiny_images(shape, count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def prepare_tiny(data_dir, shape=(12, 10, 3), declared=None, splits=("train", "test"), classes=("ant", "bee", "cat"), image_name="image"):
    """Prepares a set `tiny_set` of random images, 9 and 6 of them, the way a user's own builder would; returns its folder."""

    class TinySet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.3")

        def _info(self):
            features = {
                image_name: tfds.features.Image(shape=declared or shape),
                "label": tfds.features.ClassLabel(names=classes),
                "file": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(tiny_images(shape, count, count)) for name, count in zip(splits, (9, 6), strict=True)}

        def _generate_examples(self, images):
            for key, image in enumerate(images):
                file = io.BytesIO()
                Image.fromarray(image.squeeze()).save(file, format="png")
                yield key, {image_name: io.BytesIO(file.getvalue()), "label": key % len(classes), "file": f"{key}.png"}

    TinySet(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return Path(data_dir) / "tiny_set" / "1.2.3"


def load_tiny(folder):
    return load_dataset(DataConfig(name="tiny_set", data_dir=str(folder.parents[1])))


def refused_tiny(folder, seconds, words):
    """The text of the UsageError that loading must raise, within seconds and in one line with these words."""
    start = time.monotonic()
    with pytest.raises(UsageError) as caught:
        load_tiny(folder)
    assert time.monotonic() - start < seconds
    text = str(caught.value)
    assert text.isprintable() and len(text) < 1000 and words in text
    return text
