"""The cache is sized by the memory there is, and a context that does not fit is shortened, not fatal."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from toy import ToyModel

from nioserve.config import Config
from nioserve.engine.limits import free_memory, resolve_limits
from nioserve.models.spec import ModelError

MIB = 2**20


def limits(free: int, **engine):
    config = Config.model_validate({"model": {"path": "m"}, "engine": {"max_num_seqs": 2, **engine}})
    return resolve_limits(config, ToyModel.spec, 1024, free)


def test_with_room_every_seat_gets_a_whole_context():
    found = limits(1024 * MIB)
    assert (found.max_model_len, found.kv_cache_tokens) == (4096, 8192)


def test_with_less_room_they_share():
    found = limits(20 * MIB)
    assert found.max_model_len == 4096
    assert 4096 <= found.kv_cache_tokens < 8192


@pytest.mark.parametrize(("free", "served"), [(9, 2048), (4, 1024)])
def test_a_context_that_does_not_fit_falls_back_and_says_so(free, served, caplog):
    with caplog.at_level(logging.WARNING):
        found = limits(free * MIB)
    assert found.max_model_len == served
    assert found.kv_cache_tokens >= served
    (record,) = caplog.records
    assert record.getMessage() == "max_model_len falls back"
    assert (record.asked, record.served) == (4096, served)
    assert "4096 tokens needs 4 MiB" in record.reason


def test_a_cache_that_was_configured_counts_too():
    assert limits(1024 * MIB, kv_cache_tokens=1500).max_model_len == 1024
    assert limits(MIB, kv_cache_tokens=5000).kv_cache_tokens == 5000


def test_a_short_context_is_never_lengthened():
    assert limits(9 * MIB, max_model_len=1500).max_model_len == 1500
    with pytest.raises(ModelError, match="not even 500 tokens fit"):
        limits(MIB, max_model_len=500)


def test_when_nothing_fits_the_error_says_what_is_needed():
    with pytest.raises(ModelError, match=r"4096 tokens needs 4 MiB .* not even 1024 tokens fit.*smaller model"):
        limits(MIB)


def test_the_shares_of_the_queues_add_up():
    found = limits(1024 * MIB, conversation_share=0.3, max_num_queued_reqs=7, max_num_queued_tokens=900)
    assert found.conversations.share + found.short.share == 1
    assert (found.short.max_requests, found.conversations.max_tokens) == (7, 900)


def test_free_memory_is_that_of_machine_and_group():
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
    assert 0 < free_memory() <= int(available.split()[1]) * 1024 * 1.2
