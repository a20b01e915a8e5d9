"""A Dask cluster as joblib's backend."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any

from flashmoe.errors import FlashMoEError

SCHEMES = ("dask", "tcp")
SPEAKS_FIRST = True  # a scheduler greets who connects
ANSWER_SECONDS = 5.0  # how long it may take to answer, and to have a worker


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Within it joblib computes on the cluster whose scheduler is at `address`.

    Raises FlashMoEError where Dask is not installed, no scheduler answers, or it has no worker.
    """
    try:
        import joblib
        from distributed import Client
        from joblib._dask import DaskDistributedBackend
    except ModuleNotFoundError as error:
        raise FlashMoEError(
            f"{error.name} is not installed: pip install 'flashmoe-ssd[cluster]'"
        ) from None

    class Backend(DaskDistributedBackend):  # type: ignore[misc]
        """joblib's own; but it also ends where the cluster fails, at which joblib's waits on."""

        def submit(self, func: Any, callback: Callable[[Any], object] | None = None) -> Future[Any]:
            future: Future[Any] = super().submit(func, callback)

            def tell_failure(future: Future[Any]) -> None:  # a job's own error is a result
                if callback and (error := future.exception()):
                    callback(_failure(address, error))

            future.add_done_callback(tell_failure)
            return future

    for name in ("distributed", "distributed.client"):  # a sentence of ours says it
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        client = Client(
            address.replace("dask://", "tcp://", 1), timeout=ANSWER_SECONDS, set_as_default=False
        )
    except (OSError, ValueError, TypeError) as error:
        raise FlashMoEError(
            f"cluster {address}: no scheduler of Dask answers there ({error})"
        ) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=ANSWER_SECONDS)
        except TimeoutError:
            raise FlashMoEError(
                f"cluster {address}: it has no worker; start one with `dask worker {address}`"
            ) from None
        with joblib.parallel_config(Backend(client=client), n_jobs=-1):
            try:
                yield
            except CancelledError as error:  # its scheduler, or data that it held, is lost
                raise _failure(address, error) from error


def _failure(address: str, error: BaseException) -> FlashMoEError:
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    if "deserializ" in said:
        said = "it cannot load this project; install the same version on its machines"
    return FlashMoEError(f"cluster {address}: {said}")
