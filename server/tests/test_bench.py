"""The benchmark measures what it says: loads, counting, decoding, goals; over real sockets where it speaks HTTP."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from pathlib import Path

import pytest
from support import make_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmark is no part of the installed package

from bench import cli, null_server
from bench.adapters import Progress, run_load
from bench.client import HOST, Client, Exchange, decode, drive
from bench.course import RETRY_SECONDS, Course, Load, Record
from bench.environments import UnavailableError, run
from bench.goals import goals
from bench.machine import ceiling
from bench.processes import Running, StartError, free_port
from bench.prompts import Prompts
from bench.report import render, table
from bench.results import Results, ResultsError
from bench.stats import percentile, summarise

REQUEST = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 2\r\n\r\n{{}}".encode()


# A load


def test_streams_start_over_the_ramp_and_send_again_when_complete():
    course = Course(Load(seconds=10, ramp=4, streams=4), begin=100)
    assert course.due(100) == [100]
    assert course.due(102) == [101, 102]
    assert course.next_due() == 103
    assert course.due(110) == [103]
    assert course.next_due() is None
    course.ended(111, well=True)
    assert course.due(111) == [111]


def test_a_refused_stream_waits_before_it_asks_again():
    course = Course(Load(seconds=1, streams=1), begin=0)
    course.due(0)
    course.ended(1, well=False)
    assert course.due(1) == []
    assert course.due(1 + RETRY_SECONDS) == [1 + RETRY_SECONDS]


def test_counting_begins_after_ramp_and_first_answer_and_ends_with_an_answer_per_stream():
    course = Course(Load(seconds=10, ramp=2, streams=2), begin=0)
    course.due(2)
    course.ended(5, well=True)
    assert not course.over(14.9)
    assert not course.over(15)  # the seconds have passed, but no stream has completed within them
    course.ended(15, well=True)
    course.ended(16, well=True)
    assert course.over(16)
    assert course.window(16) == (5, 16)
    slow = Course(Load(seconds=10, streams=2), begin=0)
    slow.ended(1, well=True)
    assert not slow.over(20)
    assert slow.over(21)
    silent = Course(Load(seconds=10, ramp=2, streams=2), begin=0)
    assert not silent.over(31)
    assert silent.over(32)


def test_poisson_arrivals_keep_their_rate_however_late_the_client_is():
    load = Load(seconds=200, ramp=10, rate=50, seed=3)
    punctual = Course(load, begin=0)
    starts = [start for tenth in range(2000) for start in punctual.due(tenth / 10)]
    assert len(starts) == pytest.approx(200 * 50, rel=0.05)
    late = Course(load, begin=0)
    assert late.due(199.9) == starts
    assert late.window(210) == (10, 210)
    assert late.over(210)
    assert not late.over(209)


def test_a_counted_load_ends_with_its_last_request():
    course = Course(Load(seconds=100, streams=2, requests=3), begin=0)
    assert course.due(0) == [0, 0]
    course.ended(1, well=True)
    course.ended(1, well=True)
    assert course.due(1) == [1]
    assert not course.over(50)
    course.ended(60, well=False)
    assert course.over(60)
    assert course.due(99) == []


@pytest.mark.parametrize(
    "wrong", [{}, {"streams": 1, "rate": 2.0}, {"streams": 1, "seconds": 0}, {"streams": 1, "ramp": -1}]
)
def test_a_load_that_cannot_be_driven_is_refused(wrong):
    with pytest.raises(ValueError, match="a load needs"):
        Load(**{"seconds": 1, **wrong})


# Decoding


def _exchange(*pieces: bytes, status: int = 200) -> Exchange:
    return Exchange(0.0, status, 0.5, [(float(number), data) for number, data in enumerate(pieces, 1)], 9.0)


def test_events_may_span_pieces_and_a_piece_may_hold_several():
    record = decode(_exchange(
        b'data: {"choices":[{"text":"a"}]}\n\ndata: {"choices":[{"te',
        b'xt":"b"}]}\r\n\r\n: a comment\n\ndata: {"choices":[{"delta":{"content":"c"}}],"usage":null}\n\n',
        b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":64,"completion_tokens":3}}\n\ndata: [DONE]\n\n',
    ))  # fmt: skip
    assert record.times == [1, 2, 2]
    assert (record.prompt_tokens, record.completion_tokens, record.error) == (64, 3, "")


@pytest.mark.parametrize(
    ("exchange", "error"),
    [
        (_exchange(b'data: {"error":{"message":"lost"}}\n\n'), "error event"),
        (_exchange(b"data: {half\n\n"), "no completion chunk"),
        (_exchange(b'{"error":"busy"}', status=503), "busy"),
    ],
)
def test_what_is_no_answer_is_an_error(exchange, error):
    assert error in decode(exchange).error


# Counting


def _record(start: float, times: list[float], tokens: int | None = None, **changes) -> Record:
    finished = None if tokens is None else times[-1]
    fields = {"status": 200, "answered": start, "prompt_tokens": 64, "completion_tokens": tokens or 0}
    return Record(start, times=times, finished=finished, **{**fields, **changes})


def test_only_the_window_counts_and_pieces_weigh_what_they_held():
    records = [
        _record(0, [1, 2, 3, 4], 8),  # two tokens a piece
        _record(0, [0.5, 2.5]),  # cut off: counted as the complete ones were
    ]
    figures = summarise(records, (1, 4))
    assert figures["tokens_per_second"] == pytest.approx((3 * 2 + 1 * 2) / 3, abs=0.01)
    assert figures["tokens_per_piece"] == 2
    assert figures["ttft_ms"]["count"] == 1
    assert figures["ttft_ms"]["p50"] == 1000
    assert figures["itl_ms"]["count"] == 3
    assert (figures["complete"], figures["prompt_tokens"], figures["completion_tokens"]) == (1, [64], [8])


def test_refused_and_failed_are_told_apart():
    refused = [Record(0, status, 0.01 * number, retry_after=status == 503, error="busy")
               for number, status in enumerate((503, 429), 1)]  # fmt: skip
    figures = summarise([*refused, Record(0, 500, 1, error="oops"), Record(0, 0)], (0, 10))
    assert (figures["refused"], figures["refused_statuses"], figures["refused_with_retry_after"]) == (2, [429, 503], 1)
    assert (figures["failed"], figures["first_failure"]) == (1, "oops")
    assert figures["refusal_ms"]["p99"] == pytest.approx(19.9)
    assert figures["tokens_per_second"] == 0


def test_percentiles():
    assert percentile([], 50) is None
    assert percentile([3, 1, 2], 50) == 2
    assert percentile([0, 10], 95) == 9.5


def test_the_ceiling_is_memory_for_one_stream_and_arithmetic_for_many():
    sizes = {"layers": 90_000_000, "head": 10_000_000}
    found = {"read_gb_per_s": 10.0, "int8_tops_32": 1000.0, "int8_tops_512": 1000.0}
    assert ceiling(found, sizes, 1, 64, 64) == pytest.approx(100, rel=0.01)
    assert ceiling(found, sizes, 8, 64, 64) == pytest.approx(800, rel=0.01)
    slow = {**found, "int8_tops_32": 0.2, "int8_tops_512": 1000.0}
    assert ceiling(slow, sizes, 32, 64, 64) == pytest.approx(1000, rel=0.01)


# Prompts


def test_prompts_are_distinct_reproducible_and_of_exact_length(tmp_path):
    file = tmp_path / "tokenizer.json"
    make_tokenizer().save(str(file))
    prompts = Prompts(file)
    for length in (64, 333):
        texts = [prompts.text(length, seed) for seed in range(30)]
        assert {prompts.count(text) for text in texts} == {length}
        assert len(set(texts)) == 30
    assert prompts.ids(64, 5) == Prompts(file).ids(64, 5)
    with pytest.raises(ValueError, match="at least 24"):
        prompts.text(5, 0)


# Over sockets


async def _serving(answer, load: Load) -> tuple[list[Record], tuple[float, float]]:
    server = await asyncio.start_server(answer, HOST, 0)
    port = server.sockets[0].getsockname()[1]
    result = await drive(Client(port), load, itertools.repeat(REQUEST))
    server.close()
    return result


def test_streams_over_http_are_counted_to_the_token():
    load = Load(seconds=30, streams=3, requests=12)
    records, _ = asyncio.run(_serving(lambda r, w: null_server.serve(r, w, 0), load))
    assert len(records) == 12
    assert {(len(record.times), record.completion_tokens, record.error) for record in records} == {(64, 64, "")}
    assert all(record.start <= record.answered <= record.times[0] <= record.finished for record in records)


@pytest.mark.parametrize(
    ("answer", "status", "error"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\nContent-Length: 4\r\n\r\nbusy", 503, "busy"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:", 200, "connection was lost"),
        (b"SMTP ready\r\n\r\n", 0, "not HTTP"),
        (b"", 0, "connection was lost"),
    ],
)
def test_a_failing_server_is_a_result_and_no_crash(answer, status, error):
    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(answer)
        writer.close()

    records, _ = asyncio.run(_serving(fail, Load(seconds=30, streams=2, requests=2)))
    assert {record.status for record in records} == {status}
    assert all(error in record.error for record in records)
    assert all(record.retry_after for record in records) == (status == 503)


def test_nobody_listening_is_a_result():
    load = Load(seconds=30, streams=1, requests=1)
    records, _ = asyncio.run(drive(Client(free_port()), load, itertools.repeat(REQUEST)))
    assert "cannot connect" in records[0].error


# Libraries


class _Library:
    """An engine that gives each request a token a step."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.clock = itertools.count()
        self.dropped = False

    def add(self, key, prompt, tokens):
        assert prompt == [1, 2, 3]
        self.left[key] = tokens

    def step(self):
        now = float(next(self.clock))
        for key in list(self.left):
            self.left[key] -= 1
            yield Progress(key, now, 1, self.left[key] == 0)
            if not self.left[key]:
                del self.left[key]

    def drop(self):
        self.dropped = True


def test_a_library_is_driven_by_the_same_loads():
    engine = _Library()
    result = run_load(engine, Load(seconds=30, streams=2, requests=6), itertools.repeat([1, 2, 3]), 5)
    records = [Record(**fields) for fields in result["records"]]
    assert [record.completion_tokens for record in records] == [5] * 6
    assert engine.dropped


# Processes


def test_a_server_that_ends_or_hangs_is_told_with_its_log(tmp_path):
    ending = Running([sys.executable, "-c", "import sys; sys.exit('no model here')"], {}, tmp_path / "log")
    with pytest.raises(StartError, match="no model here"):
        ending.wait_ready(lambda: False, 60)
    hanging = Running([sys.executable, "-c", "import time; time.sleep(600)"], {}, tmp_path / "log2")
    with pytest.raises(StartError, match="not ready after"):
        hanging.wait_ready(lambda: False, 0)
    memory = hanging.memory()
    assert memory.rss >= memory.engine_rss > 0
    hanging.freeze()
    hanging.stop()
    assert not hanging.alive()


def test_stopping_takes_the_grandchildren_along(tmp_path):
    child = "import subprocess, time\nprint(subprocess.Popen(['sleep', '600']).pid, flush=True)\ntime.sleep(600)"
    running = Running([sys.executable, "-c", child], {}, tmp_path / "log", pipes=True)
    grandchild = int(running.hear(time.monotonic() + 60))
    assert grandchild in running.pids()
    running.stop()
    state = Path(f"/proc/{grandchild}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_preparation_that_fails_says_how(tmp_path):
    with pytest.raises(UnavailableError, match="status 3: no such wheel"):
        run(["sh", "-c", "echo no such wheel; exit 3"], tmp_path / "log")


# Results, goals, report


def _results(tmp_path: Path, ours: float = 400.0) -> Results:
    results = Results(tmp_path / "results.json")
    cost = {"tokens_per_second": 2000, "client_microseconds_per_token": 9, "delay_ms": {"p50": 0.1, "p99": 1}}
    results.data.update(
        date="today", settings={},
        plan={"peers": ["vllm", "openvino"], "levels": [1, 32], "rounds": 3, "seconds": 6, "ramp": 2},
        machine={"cpu": "c", "cores": 2, "features": [], "memory_gib": 23, "kernel": "6", "load_average_before": 0.1},
        ceilings={"read_gb_per_s": 20, "int8_tops_32": 1, "int8_tops_512": 3, "bf16_tops_32": 1, "bf16_tops_512": 2},
        model={"layers": 1e8, "head": 3e7, "hidden": 576, "width": 3072},
        client={kind: dict(cost) for kind in ("steady", "flat_out")},
    )  # fmt: skip
    results.data["peers"] = {
        "nioserve": {"title": "nioserve", "precision": "int8", "version": "1", "endpoint": "e", "over_http": True},
        "vllm": {"title": "vLLM", "precision": "bf16", "version": "2", "endpoint": "e", "over_http": True},
        "openvino": {"title": "OpenVINO", "precision": "int8", "over_http": False, "skipped": "no wheel | here"},
    }
    for number, noise in enumerate((0.5, 1.0, 1.5), 1):
        for level in ("1", "32"):
            for peer, speed in (("nioserve", ours), ("vllm", 100.0)):
                figures = summarise([_record(0, [1, 2], 2)], (0, 3))
                results.put("closed", peer, level, number, {**figures, "tokens_per_second": speed * noise})
    return results


def test_goals_are_judged_by_medians_and_a_missing_peer_fails(tmp_path):
    found = {goal.what: goal for goal in goals(_results(tmp_path))}
    against_vllm = found["tokens/s at 32 streams, beside vllm"]
    assert (against_vllm.measured, against_vllm.reached) == (4.0, True)
    missing = found["tokens/s at 32 streams, beside openvino"]
    assert (missing.measured, missing.reached, missing.reason) == (None, False, "not measured: openvino")
    slow = {goal.what: goal for goal in goals(_results(tmp_path, ours=200))}
    assert not slow["tokens/s at 32 streams, beside vllm"].reached
    part = found["tokens/s at 1 stream, beside the fastest of llama.cpp, vllm, openvino"]
    assert (part.measured, part.reached) == (4.0, False)
    assert "without llama.cpp, openvino" in part.reason


def test_the_overload_goal_wants_polite_refusals(tmp_path):
    results = _results(tmp_path)
    cell = {
        "seconds": 120, "tokens_per_second": 380, "alive": True, "processes_lost": 0, "failed": 0, "first_failure": "",
        "refused": 10, "refused_with_retry_after": 10, "refused_statuses": [429], "refusal_ms": {"p99": 40.0},
        "ttft_ms": {"p50": 1, "p95": 2, "p99": 3},
    }  # fmt: skip
    results.put("overload", "nioserve", "5", 1, cell)
    judged = {goal.what.partition(": ")[2]: goal for goal in goals(results) if goal.what.startswith("5 ×")}
    assert [goal.reached for goal in judged.values()] == [True, True, True, True, False]
    assert "429" in judged["refusals that are 503 with Retry-After"].reason


def test_the_report_shows_failed_goals_and_why_a_peer_is_missing(tmp_path):
    _results(tmp_path).save()
    text = render(Results.load(tmp_path / "results.json"), ["throughput.png"])
    assert "**FAILED**" in text
    assert "skipped: no wheel | here" in text
    assert "![throughput.png](throughput.png)" in text
    assert "`nioserve evaluate` was not run" in text
    assert "400 (" in text


def test_the_report_shows_the_gates_of_the_weights_that_were_measured(tmp_path):
    results = _results(tmp_path)
    row = {"tokens": 900, "perplexity": 9.5, "relative_accuracy": 1.0, "relative_perplexity": 1.01, "agreement": 0.95}
    check = {"what": "agreement", "value": 0.9, "least": 0.94, "most": None, "passed": False}
    report = {"checks": [check], "sections": {"texts": row}, "weight_bytes": 135e6, "peak_bytes": 9e8}
    results.data["evaluation"] = {"status": 1, "report": report}
    text = render(results, [])
    assert "| agreement | 0.900 | ≥ 0.94 | **FAILED** |" in text
    assert "| texts | 900 | 1.000 | 9.500 | 1.010 | 0.950 |" in text
    assert not next(goal for goal in goals(results) if "evaluate" in goal.what).reached


def test_a_table_survives_what_is_written_into_it():
    assert table(["a", "b"], [["x|y", "two\nlines"]]).splitlines()[-1] == "| x\\|y | two lines |"


def test_a_run_goes_on_where_it_was_interrupted(tmp_path):
    _results(tmp_path)
    again = Results.load(tmp_path / "results.json")
    assert again.has("closed", "vllm", "32", 3)
    assert not again.has("closed", "vllm", "8", 1)
    again.put("closed", "vllm", "32", 3, {"tokens_per_second": 7})
    assert [cell["round"] for cell in again.cells("closed", "vllm", "32")] == [1, 2, 3]
    again.forget("vllm")
    assert not again.cells("closed", "vllm")
    assert again.cells("closed", "nioserve")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 99}'])
def test_a_results_file_that_cannot_be_used_says_so(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ResultsError, match="run"):
        Results.load(tmp_path / "results.json")
    assert cli.main(["render", "--out", str(tmp_path), "--cache", str(tmp_path)]) == 1
    assert "results.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [["--peers", "sglang"], ["--levels", "0"], ["--rates", "x"], ["--set", "threads=2"], ["--scenarios", "open,shut"]],
)
def test_wrong_options_are_refused_by_name(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", *wrong])
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_rounds_must_be_positive(tmp_path, capsys):
    assert cli.main(["run", "--rounds", "0", "--out", str(tmp_path)]) == 2
    assert "--rounds" in capsys.readouterr().err


def test_the_locks_pin_everything():
    for lock in (Path(cli.__file__).parent).glob("requirements-*.lock"):
        assert all("==" in line for line in lock.read_text().splitlines()), lock
        assert lock.with_suffix(".in").is_file()
