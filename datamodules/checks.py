"""Checks of arguments that data modules share."""

__all__ = ["check_at_least"]


def check_at_least(minimum: int, **arguments: int) -> None:
    """Raise unless every argument, given by its name, is at least `minimum`.

    Raises:
        ValueError: naming the first that is not.

    Example:
        >>> check_at_least(1, batch_size=0)
        Traceback (most recent call last):
        ...
        ValueError: Expected `batch_size` to be at least 1, but got 0.
    """
    for name, value in arguments.items():
        if value < minimum:
            raise ValueError(f"Expected `{name}` to be at least {minimum}, but got {value}.")
