"""Why an engine is not served by: each is one sentence, which says whether trying again would help."""

from tiers.errors import AssayError
from tiers.manifest import SHORT_DIGEST


class EngineNotStarted(AssayError):
    """An engine ended, or was not ready in time, when it was to be started."""


class KeyRefused(EngineNotStarted):
    """An engine that somebody else runs does not let this gateway in."""

    def __init__(self, name: str, url: str) -> None:
        super().__init__(
            f"{name}: the engine at {url} refuses this gateway's key: engine_key (or ASSAY_ENGINE_KEY) must be "
            "the same here and there."
        )


class NoProbe(EngineNotStarted):
    """Nobody can say what that engine computes."""

    def __init__(self, name: str, url: str) -> None:
        super().__init__(
            f"{name}: what answers at {url} does not say what it computes, as a vLLM without Assay's probe: run "
            "it by `assay engine`."
        )


class OtherCheckpoint(EngineNotStarted):
    """An engine runs another checkpoint than the one that is to be served."""

    def __init__(self, name: str, url: str, found: str | None, wanted: str) -> None:
        runs = f"checkpoint {found[:SHORT_DIGEST]}" if found else "a checkpoint that it does not name"
        super().__init__(
            f"{name}: the engine at {url} runs {runs}, and {wanted[:SHORT_DIGEST]} is served here: give both the "
            "same, and restart this server if its own is the old one."
        )


class PrecisionRefused(AssayError):
    """What an engine computes is not what its checkpoint declares; trying again would not change that."""

    def __init__(self, name: str, disagreements: tuple[str, ...]) -> None:
        super().__init__(
            f"{name} is not served, its engine does not compute what its checkpoint declares: "
            f"{'; '.join(disagreements)}."
        )
