"""Accuracies printed in papers, to stand beside what was measured here. Nothing else in the project is typed by hand."""

import dataclasses

SOURCE = 'Kong, Guo, You, Xu, "Learning Student Networks with Few Data", AAAI 2020, Tables 2 and 3'

ACCURACY: dict[str, dict[str, dict[int | None, float]]] = {
    "cifar10": {
        "kd": {50: 28.32, 100: 31.83, 500: 50.63, 1000: 77.63, None: 79.72},
        "fitnet": {50: 31.65, 100: 29.68, 500: 54.51, 1000: 63.84, None: 77.84},
        "ab": {50: 38.23, 100: 44.70, 500: 66.69, 1000: 76.19, None: 82.65},
        "wdkd": {50: 41.16, 100: 47.24, 500: 73.08, 1000: 82.01, None: 84.66},
    },
    "fashion_mnist": {
        "kd": {50: 78.50, 100: 83.77, 500: 89.45, 1000: 90.44, None: 92.10},
        "fitnet": {50: 81.40, 100: 81.92, 500: 82.60, 1000: 91.53, None: 92.23},
        "ab": {50: 80.82, 100: 84.09, 500: 90.25, 1000: 91.67, None: 92.10},
        "wdkd": {50: 81.73, 100: 85.18, 500: 90.46, 1000: 91.95, None: 94.72},
    },
}
"""Test accuracy in %, by TFDS name, method ("ours" in the paper is wdkd) and images per class (None: all of them)."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """An accuracy that others published, with other networks, so that it gives no more than the scale."""

    images: str
    """Training images."""
    method: str
    accuracy: str
    """In %, as precisely as it is known."""
    source: str


ZSKT = "the few-shot plot of Micaelli and Storkey, NeurIPS 2019 (ZSKT)"
FS_BBT = "Nguyen et al., ECCV 2022 (FS-BBT)"
DIVBFKD = "Vo et al., ECML PKDD 2024 (DivBFKD)"
UNNAMED = "the project's protocol, which names no paper"

REFERENCES: dict[str, list[Reference]] = {
    "cifar10": [
        Reference("50 per class", "kd with attention transfer, WRN-40-2 to WRN-16-1", "68", ZSKT),
        Reference("100 per class", "kd with attention transfer, WRN-40-2 to WRN-16-1", "76", ZSKT),
        Reference("50 per class", "no teacher, WRN-16-1", "44.9", ZSKT),
        Reference("100 per class", "no teacher, WRN-16-1", "58.8", ZSKT),
        Reference("50 per class", "no teacher, harmonic WRN-16-8", "about 58", UNNAMED),
        Reference("50 per class", "no teacher, tuned", "66.5", UNNAMED),
        Reference("200 per class", "black-box few-shot kd", "76.17", FS_BBT),
        Reference("200 per class", "black-box few-shot kd, ResNet-32 to ResNet-20", "84.05", DIVBFKD),
    ],
    "fashion_mnist": [Reference("200 per class", "black-box few-shot kd, student LeNet-5-half", "86.50", DIVBFKD)],
}
"""By TFDS name."""
