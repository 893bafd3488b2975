"""The processes of an engine on CPUs sleep while they wait for each other."""

import time
from typing import Any

import pytest


def test_a_reader_that_looks_for_a_message_leaves_the_core_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    import zmq
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms import current_platform
    from vllm.utils.network_utils import get_open_zmq_ipc_path

    from tiers.probe import plugin

    # Of this process nothing else changes.
    for name in ("keep_log_clean", "keep_seeds", "round_into_cache", "register_linear_kernel"):
        monkeypatch.setattr(plugin, name, lambda *_: None)
    queues: Any = shm_broadcast
    monkeypatch.setattr(queues, "sched_yield", queues.sched_yield)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)
    context: Any = zmq.Context()
    reader = queues.SpinCondition(is_reader=True, context=context, notify_address=get_open_zmq_ipc_path())

    def share_of_a_core() -> float:
        reader.record_read()
        began, cpu = time.monotonic(), time.process_time()
        while time.monotonic() - began < 0.3:
            reader.wait()
        return (time.process_time() - cpu) / 0.3

    before = share_of_a_core()
    plugin.register()
    assert share_of_a_core() < 0.5 < before
    context.destroy(linger=0)
