"""What all tests share: JAX's settings and the order."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Nearly all the time of the tests goes into compiling tiny programs: three quarters of it are saved. Set before JAX is
# imported; processes that the tests start inherit it.
_QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}"

import jax
import pytest

SETTINGS = {
    "jax_numpy_rank_promotion": "raise",  # catches sums of [K] and [K, 1]
    "jax_enable_x64": False,
    "jax_platforms": None,
    "jax_default_matmul_precision": "highest",
    "jax_persistent_cache_min_compile_time_secs": 0.0,
}


def pytest_configure(config: pytest.Config) -> None:
    """What has been compiled is kept beside pytest's own cache."""
    directory = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    jax.config.update("jax_compilation_cache_dir", directory)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: a mistake shows early."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True)
def jax_settings() -> None:
    """A run sets some of them for its process; every test starts from the same ones."""
    for name, value in SETTINGS.items():
        if getattr(jax.config, name) != value:
            jax.config.update(name, value)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs() -> Iterator[None]:
    """Every compiled program keeps some memory mapped, and Linux allows a process 65,530 maps: all tests need more.

    What comes then is no error but a crash inside LLVM.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def float64() -> Iterator[None]:
    """For comparisons of gradients and of different orders of summation."""
    with jax.enable_x64(True):
        yield
