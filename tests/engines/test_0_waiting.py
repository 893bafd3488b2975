"""The processes of an engine on CPUs wait without looking."""

import time
from typing import Any

import pytest


def test_a_reader_sleeps_from_the_first_moment_and_wakes_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import zmq
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms import current_platform
    from vllm.utils.network_utils import get_open_zmq_ipc_path

    from tiers.probe.waiting import wait_asleep

    monkeypatch.setattr(shm_broadcast.SpinCondition.__init__, "__defaults__", (1,))
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)
    wait_asleep()
    context, address = zmq.Context(), get_open_zmq_ipc_path()
    condition: Any = shm_broadcast.SpinCondition
    writer = condition(is_reader=False, context=context, notify_address=address)
    reader = condition(is_reader=True, context=context, notify_address=address)
    reader.record_read()
    began, cpu = time.monotonic(), time.process_time()
    reader.wait(timeout_ms=200)
    assert time.monotonic() - began > 0.15, "vLLM's own comes back at once, to look again"
    assert time.process_time() - cpu < 0.1
    time.sleep(0.05)
    writer.notify()
    began = time.monotonic()
    reader.wait(timeout_ms=5000)
    assert time.monotonic() - began < 1
    context.destroy(linger=0)
