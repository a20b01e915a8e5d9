"""Many jobs at once, through joblib: in processes of this machine, or on a cluster.

joblib is imported where jobs run, so that commands without any start as fast as ever.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from flashmoe.errors import FlashMoEError
from flashmoe.util import dask_cluster, ray_cluster, workers

if TYPE_CHECKING:
    import joblib

Outcome = TypeVar("Outcome")

ANSWER_SECONDS = 5.0  # how long a cluster's machine may take to take a connection
_LIBRARIES = {scheme: kind for kind in (dask_cluster, ray_cluster) for scheme in kind.SCHEMES}
_cluster: ContextVar[str | None] = ContextVar("cluster", default=None)  # its address


@contextmanager
def on(cluster: str | None) -> Iterator[None]:
    """Within it `outcomes` computes on the cluster of this address; None: on this machine.

    cluster: dask://HOST:PORT, ray://HOST:PORT, or as Dask writes its own (tcp://HOST:PORT).
    Raises FlashMoEError where none answers within seconds, or its library is not installed.
    """
    if cluster is None:
        yield
        return
    scheme, host, port = _split(cluster)
    try:  # here, because the libraries themselves try for long, or for ever
        with socket.create_connection((host, port), ANSWER_SECONDS) as connection:
            if _LIBRARIES[scheme].SPEAKS_FIRST and not connection.recv(1):
                raise ConnectionError("it hung up")
    except OSError as error:
        raise FlashMoEError(
            f"cluster {cluster}: no scheduler answers there ({error}); see that it runs"
        ) from None
    with _LIBRARIES[scheme].connected(cluster):
        token = _cluster.set(cluster)
        try:
            yield
        finally:
            _cluster.reset(token)


def _split(cluster: str) -> tuple[str, str, int]:
    """Scheme, host and port. Raises FlashMoEError where they are not such."""
    try:
        parts = urlsplit(cluster)
        if parts.scheme in _LIBRARIES and parts.hostname and parts.port:
            return parts.scheme, parts.hostname, parts.port
    except ValueError:
        pass
    raise FlashMoEError(
        f"cluster {cluster!r}: write dask://HOST:PORT or ray://HOST:PORT, the scheduler's"
    )


def outcomes(
    function: Callable[..., Outcome], jobs: Sequence[Sequence[Any]], *, threads: bool = False
) -> Iterator[Outcome]:
    """`function(*job)` of each job, in order. Begins when the first one is asked for.

    threads: take this machine's threads, not its processes. It suits compiled code with large
    outcomes; but compiling a policy, seconds the first time, holds Python's lock.

    A job should keep to one thread. An argument that many jobs share is sent to a cluster once
    where it is the same object and large by `sys.getsizeof`; large arrays in it lie in memory
    that this machine's processes share, and cannot be written to.

    Raises what `function` raises, and FlashMoEError where what computes is lost.
    """
    import joblib

    cluster = _cluster.get()
    calls = [joblib.delayed(function)(*job) for job in jobs]
    try:
        if cluster is None:
            parallel = _in_threads() if threads else _in_processes(len(calls))
            with _interrupts_held():
                results = parallel(calls)
        else:
            results = _on_cluster()(calls)
        yield from results
    except BrokenProcessPool as error:
        raise FlashMoEError(
            "a process that computed was killed, probably for lack of memory: give fewer cores "
            "(`taskset -c 0 ...` gives one) or a cluster"
        ) from error


def _in_threads() -> joblib.Parallel:
    import joblib

    return joblib.Parallel(joblib.cpu_count(), backend="threading", return_as="generator")


def _in_processes(jobs: int) -> joblib.Parallel:
    """A single job runs in this process."""
    import joblib

    at_once = max(1, min(jobs, joblib.cpu_count()))
    with joblib.parallel_config("loky", inner_max_num_threads=1, initializer=_begin_worker):
        # one by one, because a batch may end with the slowest job while other cores have none
        return joblib.Parallel(at_once, return_as="generator", batch_size=1)


def _begin_worker() -> None:
    from joblib.externals.loky import process_executor

    workers.end_with_parent()
    # Compiled policies, which look like a leak, stay: a new worker would have to load them again.
    process_executor._MAX_MEMORY_LEAK_SIZE = float("inf")


def _on_cluster() -> joblib.Parallel:
    import joblib
    from joblib.parallel import get_active_backend

    backend, _ = get_active_backend()
    return joblib.Parallel(return_as="generator" if backend.supports_return_generator else "list")


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes that begin within it never hear of Ctrl-C, which their parent alone handles."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
