"""How many examples hypothesis draws; imported where it is installed."""

from hypothesis import HealthCheck, settings


def alike(most: int) -> settings:
    """The same `most` examples in every run."""
    return settings(
        max_examples=most,
        derandomize=True,
        database=None,
        deadline=None,  # `bounded` is the limit
        suppress_health_check=list(HealthCheck),
    )
