"""Moved."""

from shared.outage import Outage as Outage
