# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)
"""The model to serve: one that the bundle carries."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.finding import Finding, did_you_mean
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.site import Site

VARIABLE = "model_service_model"


def check_model(site: Site, models: Collection[str] | Finding | None) -> Iterator[Finding]:
    """Yield models that the bundle lacks, or why its models can't be told."""
    if isinstance(models, Finding):
        yield models
        return
    if models is None:
        return
    carried = ", ".join(sorted(models)) or "none"
    for value, hosts in site.by_value(VARIABLE, site.members("model_nodes")).items():
        if value not in models:
            yield Finding(
                site.label(hosts),
                VARIABLE,
                found="not set" if value is None else f"{value}, which the bundle doesn't carry",
                needed=f"one of the bundle's models: {carried}",
                mend=did_you_mean(str(value), models) or f"correct {VARIABLE}, or build a bundle with that model",
            )
