"""How the gateway shows itself to an upstream, and how it knows the upstream: an API key, and TLS files."""

from __future__ import annotations

import ssl

from nioserve.config import ConfigError
from nioserve.config.schema import Upstream


def request_headers(settings: Upstream) -> dict[str, str]:
    """Return the headers that tell the upstream who asks; ConfigError when the key's file cannot be read."""
    if settings.api_key_file is None:
        return {}
    try:
        return {"Authorization": f"Bearer {settings.api_key_file.read_text(encoding='utf-8').strip()}"}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"upstream.api_key_file: {settings.api_key_file} cannot be read: {error}"]) from error


def tls_context(settings: Upstream) -> ssl.SSLContext:
    """Return how https URLs are checked; ConfigError when a file cannot be used."""
    tls = settings.tls
    try:
        context = ssl.create_default_context(cafile=tls.ca)
        if tls.certificate is not None:
            context.load_cert_chain(tls.certificate, tls.key)
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(str(file) for file in (tls.ca, tls.certificate, tls.key) if file)
        raise ConfigError([f"upstream.tls: {files} cannot be used: {error}"]) from error
    return context


def file_findings(settings: Upstream) -> list[str]:
    """Return what is wrong with the files that the settings name."""
    findings = []
    for use in (request_headers, tls_context):
        try:
            use(settings)
        except ConfigError as error:
            findings += error.findings
    return findings
