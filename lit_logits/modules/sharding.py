"""Strategies that keep parameters in pieces, and what cannot be trained so.

FSDP gathers the weights of the model for each step, and only inside of it. What reads or writes a weight between steps
would see this rank's piece of it.
"""

__all__ = ["check_whole_weights", "shards_weights"]

_SHARDING = {"FSDPStrategy", "ModelParallelStrategy"}


def shards_weights(strategy: object) -> bool:
    """Return whether a strategy, or the class that it derives from, keeps parameters in pieces, by name.

    Example:
        >>> class FSDPStrategy: ...
        >>> class Mine(FSDPStrategy): ...
        >>> shards_weights(Mine()), shards_weights(object())
        (True, False)
    """
    return any(kind.__name__ in _SHARDING for kind in type(strategy).__mro__)


def check_whole_weights(strategy: object, name: str) -> None:
    """Raise if a strategy keeps parameters in pieces; `name` is of what changes them between steps."""
    if shards_weights(strategy):
        raise ValueError(
            f"Expected whole parameters with {name}, which changes codes between steps, but got"
            f" {type(strategy).__name__}, which keeps them in pieces. Use DDP, or leave {name} out."
        )
