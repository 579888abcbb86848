"""The configuration of a run: YAML, environment and key=value in, frozen sections out."""

from maxtext.config.config import Config
from maxtext.config.devices import check_devices
from maxtext.config.loading import load

__all__ = ["Config", "check_devices", "load"]
