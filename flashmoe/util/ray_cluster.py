"""A Ray cluster as joblib's backend."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from flashmoe.errors import FlashMoEError

SCHEMES = ("ray",)
SPEAKS_FIRST = False


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Within it joblib computes on the cluster whose client server is at `address`.

    Raises FlashMoEError where Ray is not installed, or nothing answers.
    """
    try:
        import joblib
        import ray
        from ray.util.joblib import register_ray
    except ModuleNotFoundError as error:
        raise FlashMoEError(
            f"{error.name} is not installed: pip install 'flashmoe-ssd[ray]'"
        ) from None
    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise FlashMoEError(f"cluster {address}: no Ray answers there ({error})") from None
    try:
        register_ray()
        cores = int(ray.cluster_resources().get("CPU", 1))
        with joblib.parallel_config("ray", n_jobs=max(1, cores)):
            yield
    except ray.exceptions.RayError as error:
        said = str(error).strip().partition("\n")[0]
        raise FlashMoEError(f"cluster {address}: {said}") from error
    finally:
        ray.shutdown()
