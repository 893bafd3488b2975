"""Model name → tier → replica. Knows names; knows nothing of HTTP."""

from collections.abc import Iterable

from server.errors import ModelNotFound, PrecisionNotAvailable
from server.replica import Replica


class Routes:
    """Every name a caller may use, and the replica behind it. A name that is not here is no tier's."""

    def __init__(self, replicas: Iterable[Replica]) -> None:
        self._by_name = {name: replica for replica in replicas for name in replica.tier.names}

    @property
    def names(self) -> list[str]:
        """All model names, in the order of the config."""
        return list(self._by_name)

    def resolve(self, name: str) -> Replica:
        """The replica that answers to ``name``, ready or not.

        Raises:
            ModelNotFound: nothing is of this name.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise ModelNotFound(name, self.names) from None

    def check_pin(self, replica: Replica, pinned: str | None) -> None:
        """Hold the precision that a caller insists on, if any, against that of the tier it named.

        Raises:
            PrecisionNotAvailable: the tier has another one; the sentence says which name would have it.
        """
        precision = replica.manifest.precision.name
        if pinned in (None, precision):
            return
        same_model = {each for each in self._by_name.values() if each.tier.model == replica.tier.model}
        elsewhere = sorted(each.tier.name for each in same_model if each.manifest.precision.name == pinned)
        raise PrecisionNotAvailable(str(pinned), replica.tier.name, precision, elsewhere)
