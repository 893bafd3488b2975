"""The routes by which the gateway asks an engine what it computes, and sends it to sleep.

An endpoint plugin of vLLM, loaded inside the engine; tiers/probe/lock.py lets only the holder of its key through.
"""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request

from tiers.conformance.faults import Planting
from tiers.conformance.sequence import Scored, Sequence
from tiers.probe.planting import Front
from tiers.probe.reading import (
    CALLERS_ROUTE,
    CHECKPOINT,
    CHECKPOINT_ROUTE,
    FAULT_ROUTE,
    OWN,
    READING_ROUTE,
    SCORE_ROUTE,
    SLEEP_ROUTE,
    WAKE_ROUTE,
    CheckpointReading,
    may_plant,
)
from tiers.probe.walk import WalkFailed, walk

RPC_TIMEOUT_S = 60.0
WEIGHTS_TO_RAM = 1
"""vLLM's sleep level: weights are kept in RAM, the KV cache is dropped."""


class ProbeRoutes:
    """Adds the routes; the workers' side is `tiers.probe.worker.ProbeWorker`."""

    name = "assay"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Register the routes."""

        @app.get(READING_ROUTE)
        async def reading(request: Request) -> list[dict[str, Any]]:
            engine = request.app.state.assay_engine
            answers: list[dict[str, Any]] = await engine.collective_rpc("assay_reading", timeout=RPC_TIMEOUT_S)
            # Said here, for workers on other nodes need not have this variable.
            told = os.environ.get(CHECKPOINT) or None
            return [answer | {"checkpoint": told} for answer in answers]

        @app.get(CHECKPOINT_ROUTE)
        async def checkpoint(request: Request) -> CheckpointReading:
            found: CheckpointReading | None = request.app.state.assay_checkpoint
            if found is None:
                raise HTTPException(404, "This engine's model is no checkpoint of Assay.")
            return found

        @app.post(SLEEP_ROUTE)
        async def sleep(request: Request) -> None:
            await request.app.state.assay_engine.sleep(WEIGHTS_TO_RAM, "wait")

        @app.post(WAKE_ROUTE)
        async def wake(request: Request) -> None:
            await request.app.state.assay_engine.wake_up()

        @app.post(SCORE_ROUTE)
        async def scored(request: Request, sequence: Sequence) -> Scored:
            try:
                return await walk(request.app.state.assay_engine, sequence)
            except WalkFailed as failure:
                raise HTTPException(409, str(failure)) from failure

        @app.get(CALLERS_ROUTE)
        async def callers(request: Request) -> int:
            requests = request.app.state.assay_engine.output_processor.request_states
            return sum(OWN not in name for name in requests)

        if may_plant():
            self._attach_fault_route(app)

    def _attach_fault_route(self, app: FastAPI) -> None:
        fronts: list[Front] = []

        @app.post(FAULT_ROUTE)
        async def planted(request: Request, planting: Planting) -> int:
            if not fronts:
                fronts.append(Front(request.app.state))
            try:
                return await fronts[0].plant(planting.fault)
            except WalkFailed as failure:
                raise HTTPException(409, str(failure)) from failure

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Keep the way to the workers, and what is said of the checkpoint: it may be built anew meanwhile."""
        state.assay_engine = engine_client
        state.assay_checkpoint = _checkpoint(Path(args.model))


def _checkpoint(folder: Path) -> CheckpointReading | None:
    try:
        manifest, config = (folder / "manifest.json").read_bytes(), (folder / "config.json").read_bytes()
        return CheckpointReading(manifest=manifest.decode(), config=config.decode())
    except (OSError, UnicodeDecodeError):
        return None
