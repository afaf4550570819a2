"""TFDS builder of the embedded default: scikit-learn's 1,797 real handwritten digits. Prepares without tensorflow."""

import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from wdkd.subset import validation_split

TEST_SIZE = 540


class Digits(tfds.core.GeneratorBasedBuilder):
    """8x8 grey images (8, 8, 1) of the digits 0 to 9, uint8; a fixed test split with 54 images of each class.

    Each split keeps scikit-learn's order. Source: Alpaydin and Kaynak, UCI Optical Recognition of Handwritten Digits, 1998.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of 8x8 pixels, as scikit-learn has them (the test part of the UCI set).",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://doi.org/10.24432/C50P49",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # Nothing is downloaded.
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        train, test = validation_split(digits.target, TEST_SIZE)
        return {name: self._generate_examples(images[rows], digits.target[rows]) for name, rows in (("train", train), ("test", test))}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict]]:
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = io.BytesIO()
            # An array would be encoded by tensorflow; PNG bytes are taken as they are.
            Image.fromarray(image).save(file, format="png")
            yield key, {"image": io.BytesIO(file.getvalue()), "label": int(label)}
