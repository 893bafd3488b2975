"""From a Config to replicas that could be started: checkpoints whole, places found, nothing running yet."""

from collections.abc import Sequence

from server.backend import backend_of
from server.checkpoints import Checkpoints
from server.config import Config
from server.elsewhere import Elsewhere
from server.engine_key import VARIABLE, engine_key
from server.engines.fleet import Fleet
from server.engines.pool import Pool
from server.engines.scaling import Scaling
from server.launch.cluster import Cluster
from server.layout import Layout
from server.metrics import Metrics
from server.progress import Steps
from tiers.engine import Backend, engine_command
from tiers.errors import ConfigError
from tiers.hardware import Machine
from tiers.placement import place
from tiers.tier import Tier


async def prepare(
    config: Config,
    steps: Steps,
    *,
    build: bool,
    takes_faults: bool = False,
    writes_down: bool = False,
) -> tuple[Fleet, Metrics]:
    """Check everything, build what is missing, and lay out the replicas; no engine is started."""
    placed = config.tiers_started
    followed = [tier for tier in config.tiers if tier.resources.launch == "url"]
    cluster = nodes = backend = None
    if placed:
        backend = backend_of(config)
        for tier in placed:
            engine_command(tier, backend, port=0, api_key="")  # refuses arguments that cannot be
        cluster = await _cluster_of(config, backend)
        nodes = cluster.nodes if cluster else None
        place(placed, Machine.here(backend), nodes)  # before hours of building
    checkpoints = Checkpoints(config, steps, may_build=build)
    key = _key(config, followed)
    manifests = await checkpoints.prepare(placed) if placed else {}
    described = await Elsewhere(config, checkpoints, steps, key).describe(followed) if followed else {}
    metrics = Metrics()
    layout = Layout(config, metrics, checkpoints, takes_faults=takes_faults, writes_down=writes_down)
    pools: list[Pool] = []
    scalings: list[Scaling] = []
    if placed and backend:
        plans = place(placed, Machine.here(backend), nodes)
        pools, scalings = layout.started(plans, manifests, backend, cluster)
    followings = [layout.followed(*described[tier.name], key) for tier in followed]
    every = {pool.tier.name: pool for pool in (*pools, *(following.pool for following in followings))}
    in_order = [every[tier.name] for tier in config.tiers]
    return Fleet(in_order, followings, scalings, leave_within_s=config.request_timeout_s), metrics


async def _cluster_of(config: Config, backend: Backend) -> Cluster | None:
    """The Ray cluster, joined, if a tier is to be there."""
    if any(tier.resources.launch == "ray" for tier in config.tiers):
        return await Cluster.join(config.ray, backend)
    return None


def _key(config: Config, followed: Sequence[Tier]) -> str:
    """What engines elsewhere are shown; empty where there are none."""
    if not followed:
        return ""
    key = engine_key(config.engine_key)
    if key is None:
        raise ConfigError(
            f"{followed[0].name} is of launch: url, and there is no key to show to its engines: set engine_key in "
            f"the config, or {VARIABLE}, to the one that they were started with."
        )
    return key
