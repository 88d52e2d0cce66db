"""metarl: experiments in meta-reinforcement learning."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metarl_cli.runner import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Late: `metarl --help` must not import JAX.
    if name == "load":
        from metarl_cli.runner import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
