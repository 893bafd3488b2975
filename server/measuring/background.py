"""Certifies, beside a server that runs, the tiers of which no certificate speaks.

In a process of its own, for what computes intervals and draws pictures would keep callers waiting; with less of
the CPU than anyone, and letting callers' requests go first.
"""

import logging
import sys
from collections.abc import Sequence

from server.certificates import Certificates
from server.config import Config
from server.engines.pool import Pool
from server.launch.process import LocalProcess
from server.standing import Standings
from tiers.tier import TierKind

log = logging.getLogger("assay.certify")

LOG_NAME = "certify.log"
_LEAST_OF_THE_CPU = ("nice", "-n", "19")


async def certify_in_background(config: Config, pools: Sequence[Pool]) -> None:
    """Certify, one time, the tiers that lack a certificate of what runs now; nothing where that is off.

    A tier that was measured, whatever came of it, is not measured again; and none can be whose model's Reference
    is not served beside it.
    """
    if config.certify == "off":
        return
    own = {tier.name for tier in config.tiers_started}
    pools = [pool for pool in pools if pool.tier.name in own]  # whoever runs the others certifies them
    references = {pool.tier.model for pool in pools if pool.tier.kind is TierKind.REFERENCE}
    tiers = [pool.tier.name for pool in _unmeasured(config, pools) if pool.tier.model in references]
    if not tiers:
        return
    try:
        await _certify(config, tiers)
    except OSError as error:
        log.error("nothing is certified in the background (%s)", error)  # noqa: TRY400  # the sentence says it all
        return
    left = [pool.tier.name for pool in _unmeasured(config, pools) if pool.tier.name in tiers]
    log_file = config.logs / LOG_NAME
    if left:
        log.error(
            "%s could not be certified; `assay certify` tries again, and %s says why", ", ".join(left), log_file
        )
    else:
        log.warning("certified: the report is %s", config.certificates / "report.html")


async def _certify(config: Config, tiers: Sequence[str]) -> None:
    settings = config.logs / "certify.yaml"
    settings.write_text(config.model_dump_json(exclude_unset=True), encoding="utf-8")  # JSON is YAML
    quick = ("--quick",) if config.certify == "quick" else ()
    process = await LocalProcess.start(
        [
            *_LEAST_OF_THE_CPU,
            *(sys.executable, "-P", "-m", "server.cli", "certify", *tiers, *quick, "--config", str(settings)),
        ],
        {},
        config.logs / LOG_NAME,
    )
    log.warning("no certificate speaks of %s: measuring in the background (%s)", ", ".join(tiers), process.log)
    try:
        await process.wait()
    finally:
        await process.stop()


def _unmeasured(config: Config, pools: Sequence[Pool]) -> list[Pool]:
    """Of those that can be measured while they serve."""
    standings = Standings(Certificates(config.certificates), config.budget_of)
    able = [pool for pool in pools if pool.can_answer and pool.tier.resources.idle != "sleep"]
    return [pool for pool in able if not standings.of(pool).holds]
