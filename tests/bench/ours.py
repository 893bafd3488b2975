"""The real gateway in front of the fake upstream: the application and the HTTP server of `assay serve`.

usage: python -m tests.bench.ours --upstream URL --port PORT --home FOLDER

Only the engine is another: nothing is started, and its URL is the upstream's.
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path

import uvloop

from server.app import Gateway, build_app
from server.checkpoints import Checkpoints
from server.config import Config
from server.engines.engine import Engine
from server.engines.fleet import Fleet
from server.engines.pool import Pool
from server.engines.replica import Replica
from server.engines.state import State
from server.keys import Keys
from server.launch.local import LocalLaunch
from server.listener import http_server, listening_socket
from server.metrics import Metrics
from server.progress import Steps
from server.serve import spare_the_collector
from tiers.manifest import Manifest
from tiers.tier import Tier

AT_ONCE = 256


class UpstreamReplica(Replica):
    """A replica whose engine somebody else runs."""

    def connect(self, url: str) -> None:
        """Ready, with the engine at ``url``."""
        self._engine = Engine(self.tier.name, url, "unused", None)
        self.state = State.READY


def app_of(config: Config, metrics: Metrics, upstream: str) -> Gateway:
    """The application, with all that it can be told to do switched on."""
    tier = config.tiers[0]
    replica = UpstreamReplica(
        tier,
        _manifest(tier),
        2048,
        launch=LocalLaunch("cpu"),
        checkpoints=Checkpoints(config, Steps()),
        logs=config.logs,
        metrics=metrics,
        start_timeout_s=config.start_timeout_s,
    )
    replica.connect(upstream)
    pool = Pool(tier, replica.manifest, 2048, [replica], metrics, max_num_seqs=AT_ONCE)
    return build_app(config, Fleet([pool]), Keys(config.keys_file), metrics)


def _manifest(tier: Tier) -> Manifest:
    return Manifest(
        model=tier.model,
        recipe=tier.recipe.name,
        recipe_text="",
        precision=tier.recipe.precision,
        source=tier.source,
        provenance="none: a fake upstream",
        seed=0,
        bits_per_weight=16,
        versions={},
        created=datetime.now(UTC),
        files={},
    )


async def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--home", type=Path, required=True)
    options = parser.parse_args()
    config = Config(home=options.home, port=options.port)
    with listening_socket(config.host, config.port) as listener:
        metrics = Metrics()
        spare_the_collector()
        await http_server(app_of(config, metrics, options.upstream), config, metrics).serve([listener])


if __name__ == "__main__":
    uvloop.run(main())
