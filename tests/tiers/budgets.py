"""What the certificates of tests are judged by; apart, for it takes nothing to import."""

from tiers.conformance.scores import PHASES, Phase

BUDGET: dict[Phase, dict[str, float]] = {
    phase: {"kl": 0.012, "rejection": 0.035, "perplexity_gap": 0.05} for phase in PHASES
}
