"""TFDS builder of a folder of one's own images, once they are read. Prepares without tensorflow."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from wdkd.contents import Contents


class Folder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Images uint8 (H, W, C) of one size, in the order in which they are given. Those without a class have label 0."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, contents: Contents, **options: Any) -> None:
        self._contents = contents
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        names = self._contents.class_names or ("unlabelled",)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images of a folder, resized and cropped.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=self._contents.train_images.shape[1:], encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=names),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # Nothing is downloaded.
        found = self._contents
        return {
            "train": self._generate_examples(found.train_images, found.train_labels),
            "test": self._generate_examples(found.test_images, found.test_labels),
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict]]:
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = io.BytesIO()
            # An array would be encoded by tensorflow; PNG bytes are taken as they are.
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="png")
            yield key, {"image": io.BytesIO(file.getvalue()), "label": max(int(label), 0)}
