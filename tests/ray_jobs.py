"""What the jobs of test_ray.py do, in a module that the processes of a cluster import in little time."""

import os
import signal

from test_pool import act

from wdkd.errors import UsageError


def do(job, interruption):
    """The function of these tests' pools."""
    match job:
        case "complain", names:
            raise UsageError(f"{os.getcwd()} {' '.join(repr(os.environ.get(name)) for name in names)}")
        case "lose Ray's process", directory:
            (directory / str(os.getpid())).touch()
            os.kill(os.getppid(), signal.SIGKILL)
            return act(("work", directory), interruption)
    return act(job, interruption)
