"""Threads that meet where a test says so. Whoever waits gives up after a while, so that a deadlock fails and does not hang."""

import threading

import torch

PATIENCE = 60  # seconds


class Meeting(threading.Barrier):
    """A barrier that nobody waits at for ever."""

    def __init__(self, parties: int = 2):
        super().__init__(parties, timeout=PATIENCE)


def wait(event: threading.Event) -> None:
    assert event.wait(PATIENCE), "what was waited for did not happen"


def together(*jobs, meeting: threading.Barrier | None = None) -> list:
    """Runs each job in a thread of its own; what they returned. The first error is raised here; it ends `meeting`."""
    results, errors = [None] * len(jobs), []

    def work(i):
        torch.set_num_threads(1)  # each thread has a number of its own
        try:
            results[i] = jobs[i]()
        except BaseException as error:
            errors.append(error)
            if meeting is not None:
                meeting.abort()

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(jobs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(4 * PATIENCE)
    if errors:
        raise errors[0]
    assert not any(t.is_alive() for t in threads), "a thread hangs"
    return results
