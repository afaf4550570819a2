"""Trains a teacher: an ordinary run of method ce on the whole training set. Its --workdir is what distill.py takes as --teacher."""

from wdkd import command_line
from wdkd.config import TEACHERS

if __name__ == "__main__":
    command_line.train(TEACHERS, description=__doc__)
