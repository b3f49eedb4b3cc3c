"""What the supervisor knows of an upstream: whether it is healthy, and its metrics. It has no engine process to ask.

Both are fetched in threads, with short timeouts: neither the supervisor's loop nor a scrape waits for an upstream that
hangs.
"""

from __future__ import annotations

import http.client
import logging
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from nioserve.backends.credentials import request_headers, tls_context
from nioserve.config.schema import Upstream as Settings

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_ANSWER_SECONDS = 2.0
_FORGIVEN = 1
"""Health checks that may fail in a row before an upstream counts as down: a busy one may be late once."""
_LARGEST_PAGE = 16 << 20
_ERRORS = (OSError, http.client.HTTPException, ValueError)
"""What fetching and reading a page may end in; URLError and timeouts are OSErrors."""


class Page:
    """GET, with the upstream's key and certificates."""

    def __init__(self, settings: Settings) -> None:
        self._headers = request_headers(settings)
        # No proxy from the environment comes between, and no redirection leads elsewhere.
        self._opener = urllib.request.OpenerDirector()
        handlers = (urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(context=tls_context(settings)),
                    urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor())  # fmt: skip
        for handler in handlers:
            self._opener.add_handler(handler)

    def get(self, url: str) -> str:
        """Return a page's text; one of _ERRORS when there is none, or no 200."""
        request = urllib.request.Request(url, headers=self._headers)  # noqa: S310  the schema lets http(s) pass alone
        with self._opener.open(request, timeout=_ANSWER_SECONDS) as answer:
            body: bytes = answer.read(_LARGEST_PAGE)
            return body.decode("utf-8")


class HealthWatch:
    """Asks each URL's /health every second, from a thread of its own."""

    def __init__(self, settings: Settings) -> None:
        self._page, self._failures = Page(settings), dict.fromkeys(settings.urls, _FORGIVEN + 1)
        self._problem = "nothing is known of the upstream yet"
        for url in settings.urls:
            threading.Thread(target=self._follow, args=(url,), name=f"health of {url}", daemon=True).start()

    def problem(self) -> str | None:
        """Return why no request can be answered now; None when at least one URL is healthy."""
        return None if any(count <= _FORGIVEN for count in self._failures.values()) else self._problem

    def _follow(self, url: str) -> None:
        pause = threading.Event()
        known = False
        while True:
            try:
                self._page.get(f"{url}/health")
                self._failures[url], known = 0, True
            except _ERRORS as error:
                # One that was never healthy has nothing to be forgiven.
                self._failures[url] = self._failures[url] + 1 if known else _FORGIVEN + 1
                self._problem = f"the upstream {url} is not healthy: {error}"
            pause.wait(_POLL_SECONDS)


class UpstreamCollector(Collector):
    """The upstream's metrics as ours: `vllm:num_requests_running` is `nioserve_upstream_vllm_num_requests_running`.

    Each sample gets the label `upstream`, the URL's host and port. `nioserve_upstream_scrape_success` is 0 for one that
    did not answer; that is all that its failure changes.
    """

    def __init__(self, settings: Settings) -> None:
        self._page = Page(settings)
        self._urls = settings.metrics_urls or tuple(f"{url}/metrics" for url in settings.urls)

    def collect(self) -> Iterator[Metric]:
        """Yield all families, each once."""
        success = GaugeMetricFamily(
            "nioserve_upstream_scrape_success", "1 where the upstream's metrics could be read.", labels=["upstream"]
        )
        merged: dict[tuple[str, str], Metric] = {}
        with ThreadPoolExecutor(len(self._urls)) as pool:
            for url, families in zip(self._urls, pool.map(self._fetch, self._urls), strict=True):
                success.add_metric([_label(url)], float(families is not None))
                for family in families or ():
                    _merge(merged, family, _label(url))
        yield success
        yield from merged.values()

    def _fetch(self, url: str) -> list[Metric] | None:
        try:
            return list(text_string_to_metric_families(self._page.get(url)))
        except _ERRORS as error:
            log.debug("the upstream's metrics cannot be read", extra={"url": url, "problem": str(error)})
            return None


def _merge(merged: dict[tuple[str, str], Metric], family: Metric, upstream: str) -> None:
    name = _name(family.name)
    # Two servers may mean different things by one name; a name has one type on a page.
    if any(known == name and kind != family.type for known, kind in merged):
        return
    metric = merged.setdefault((name, family.type), Metric(name, family.documentation, family.type))
    for sample in family.samples:
        labels = {**sample.labels, "upstream": upstream}
        metric.add_sample(_name(sample.name), labels, sample.value, sample.timestamp)


def _name(name: str) -> str:
    return "nioserve_upstream_" + name.removeprefix("nioserve_").replace(":", "_")


def _label(url: str) -> str:
    return urllib.parse.urlsplit(url).netloc.rpartition("@")[2]
