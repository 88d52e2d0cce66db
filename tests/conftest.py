"""What all tests share: JAX's settings and the order."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Nearly all the time of the tests goes into compiling tiny programs: three quarters of it are saved. Set before JAX is
# imported; processes that the tests start inherit it.
_QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}"

# No persistent cache: reading back a program that the same process has compiled crashed JAX 0.10.2 in a long session.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
import pytest

SETTINGS = {
    "jax_numpy_rank_promotion": "raise",  # catches sums of [K] and [K, 1]
    "jax_enable_x64": False,
    "jax_platforms": None,
    "jax_default_matmul_precision": "highest",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: a mistake shows early."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True)
def jax_settings() -> None:
    """A run sets some of them for its process; every test starts from the same ones."""
    for name, value in SETTINGS.items():
        if getattr(jax.config, name) != value:
            jax.config.update(name, value)


@pytest.fixture
def float64() -> Iterator[None]:
    """For comparisons of gradients and of different orders of summation."""
    with jax.enable_x64(True):
        yield
