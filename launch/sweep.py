"""Runs a grid of students: methods × images per class × seeds × augmentations × radii. The same command goes on where it stopped."""

from wdkd import command_line
from wdkd.config import STUDENTS

if __name__ == "__main__":
    command_line.sweep(STUDENTS, description=__doc__)
