"""The service's configuration: its schema, and how file, environment and flags become one."""

from nioserve.config.load import ConfigError, load_config
from nioserve.config.schema import Config

__all__ = ["Config", "ConfigError", "load_config"]
