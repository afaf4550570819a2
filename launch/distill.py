"""Distils a student from a teacher and a few images per class. The same command goes on where it was stopped."""

from wdkd import command_line
from wdkd.config import STUDENTS

if __name__ == "__main__":
    command_line.train(STUDENTS, description=__doc__)
