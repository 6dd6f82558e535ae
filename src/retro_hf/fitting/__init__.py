"""A reader fitted to documents of one's own: the experiment from texts to a measured adapter, in one call."""

from .result import Fit
from .run import fit


__all__ = ["Fit", "fit"]
