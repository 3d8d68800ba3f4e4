"""The YAML schema of a run, and nothing else in the package knows YAML."""

from robustflat.config.reading import ConfigError, check_config, read_config, write_config
from robustflat.config.schema import RunConfig

__all__ = ["ConfigError", "RunConfig", "check_config", "read_config", "write_config"]
