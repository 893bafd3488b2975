"""What is measured here is made up."""

from functools import partial

import pytest

from tiers.conformance import statistics

RESAMPLES = 500


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What intervals are good for is shown where statistics are tested, of as many as are really drawn."""
    monkeypatch.setattr(statistics, "measure", partial(statistics.measure, resamples=RESAMPLES))
