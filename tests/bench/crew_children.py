"""Children for test_crew, one for each way to end."""

import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

from headrace.errors import ModelError
from headrace.processes import ChildFailed, Ready, become_child


@dataclass(frozen=True)
class Job:
    report: Connection


def says_ready_and_waits(job):
    become_child()
    job.report.send(Ready(("noted",)))
    job.report.recv()


def says_ready_and_sleeps(job):
    become_child()
    job.report.send(Ready((str(os.getpid()),)))
    time.sleep(600)


def says_whether_ctrl_c_is_held_back(job):
    held_back = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    become_child()
    job.report.send(Ready((str(held_back),)))


def fails(job):
    become_child()
    job.report.send(ChildFailed(ModelError("wrong keys")))


def is_killed(job):
    become_child()
    os.kill(os.getpid(), signal.SIGKILL)


def exits_with_7(job):
    os._exit(7)


def ends_in_silence(job):
    become_child()
