"""Starts enclaves on one host and gives each its one way out."""

from __future__ import annotations

__all__ = ["EnclaveProcess", "Launcher", "Measured", "Platform", "Timing", "link_app"]

from cloister.host.launcher.launcher import Launcher, Timing
from cloister.host.launcher.link import link_app
from cloister.host.launcher.platform import EnclaveProcess, Measured, Platform
