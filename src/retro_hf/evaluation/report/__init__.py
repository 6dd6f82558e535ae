"""An evaluation as text, as charts, and as an HTML page."""

from .page import write_report


__all__ = ["write_report"]
