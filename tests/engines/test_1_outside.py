"""The Lite tier as a server that someone else runs, by the gateway's public API: below what the probe says."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from server.engines.engine import Engine
from server.measuring.certify_outside import score as score_outside
from server.measuring.measure import make_pack, score
from server.measuring.outside import PublicApi
from tests.engines.conftest import CHECKPOINTS, MODEL, Server
from tests.engines.test_1_conformance import Engines, silent
from tiers.conformance.pack import Pack
from tiers.conformance.prompts import load_prompts
from tiers.conformance.scores import PHASES, Phase, Scores

pytestmark = pytest.mark.timeout(600)
REFERENCE = CHECKPOINTS / MODEL / "bf16"
TOKENS = 12
PROMPTS = sorted(
    (prompt for prompt in load_prompts(quick=True) if not prompt.tools),
    key=lambda prompt: len(str(prompt.messages).encode()),
)[:3]


@pytest.mark.slow
def test_bounds_by_the_public_api_are_below_what_the_probe_says(assay: Server, tmp_path: Path) -> None:
    engines = Engines(assay)

    async def make(engine: Engine) -> Pack:
        name = f"{MODEL}-Reference"
        return await make_pack(
            engine, name, REFERENCE, PROMPTS, [], tmp_path, tokens=TOKENS, fingerprint="test", say=silent
        )

    async def exact_of(engine: Engine) -> dict[Phase, Scores]:
        return {phase: await score(engine, pack, REFERENCE, phase, say=silent) for phase in PHASES}

    async def outside() -> dict[Phase, Scores]:
        async with PublicApi(f"{assay.url}/v1", f"{MODEL}-Lite") as api:
            assert await api.check(pack, PROMPTS) == 20
            return await score_outside(api, pack, say=silent)

    pack: Pack = engines.run("Reference", make)
    exact: dict[Phase, Scores] = engines.run("Lite", exact_of)
    bounds = asyncio.run(outside())
    for phase in PHASES:
        places = {place: row for row, place in enumerate(_places(exact[phase]))}
        same = exact[phase].where(
            np.isin(np.arange(len(exact[phase])), [places[p] for p in _places(bounds[phase])])
        )
        assert _places(same) == _places(bounds[phase])
        kl, tv = bounds[phase].kl, bounds[phase].tv
        print(f"{phase}: {len(kl)} tokens, KL at least {kl.mean():.4f} of {same.kl.mean():.4f}")
        # Token by token they are of two runs, whose batches were not the same.
        assert 0.3 * same.kl.mean() < kl.mean() < 1.1 * same.kl.mean()
        assert 0.3 * same.tv.mean() < tv.mean() < 1.1 * same.tv.mean()
        assert (kl > same.kl * 1.5 + 0.02).mean() < 0.1
        assert np.abs(bounds[phase].ln_q - same.ln_q).mean() < 0.1
        assert (bounds[phase].top_p == same.top_p).mean() > 0.95
        assert (bounds[phase].top_q == same.top_q).mean() > 0.9
    assert len(bounds["prefill"]) == len(exact["prefill"])
    assert len(bounds["decode"]) > len(exact["decode"]) // 3


def _places(scores: Scores) -> list[tuple[int, int]]:
    return list(zip(scores.prompt.tolist(), scores.position.tolist(), strict=True))
