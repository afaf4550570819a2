"""What a user should know, though nothing is wrong with what was asked for."""

import sys


def note(line: str) -> None:
    """Says it on one line of stderr."""
    print(f"note: {' '.join(line.split())}", file=sys.stderr, flush=True)
