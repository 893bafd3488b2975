"""Model name → tier. Knows names; knows nothing of HTTP."""

from collections.abc import Iterable

from server.engines.pool import Pool
from server.errors import ModelNotFound, PrecisionNotAvailable


class Routes:
    """Every name a caller may use, and the tier's replicas behind it. A name that is not here is no tier's."""

    def __init__(self, pools: Iterable[Pool]) -> None:
        self._by_name = {name: pool for pool in pools for name in pool.tier.names}

    @property
    def pools(self) -> list[Pool]:
        """Every tier, once."""
        return list(dict.fromkeys(self._by_name.values()))

    @property
    def names(self) -> list[str]:
        """All model names, in the order of the config."""
        return list(self._by_name)

    def resolve(self, name: str) -> Pool:
        """The replicas that answer to ``name``, ready or not.

        Raises:
            ModelNotFound: nothing is of this name.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise ModelNotFound(name, self.names) from None

    def check_pin(self, pool: Pool, pinned: str | None) -> None:
        """Hold the precision that a caller insists on, if any, against that of the tier it named.

        Raises:
            PrecisionNotAvailable: the tier has another one; the sentence says which name would have it.
        """
        precision = pool.manifest.precision.name
        if pinned in (None, precision):
            return
        same_model = {each for each in self._by_name.values() if each.tier.model == pool.tier.model}
        elsewhere = sorted(each.tier.name for each in same_model if each.manifest.precision.name == pinned)
        raise PrecisionNotAvailable(str(pinned), pool.tier.name, precision, elsewhere)
