"""What starts a run elsewhere: machines by name, manifests and command lines; knows no jax."""

from maxtext.jobs.job import Job
from maxtext.jobs.machines import Machine, find
from maxtext.jobs.sections import Launch

__all__ = ["Job", "Launch", "Machine", "find"]
