"""Accuracies printed in the paper, to stand beside what was measured here. Nothing else in the project is typed by hand."""

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
