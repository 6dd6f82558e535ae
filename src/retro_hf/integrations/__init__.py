"""Retrievers of other libraries over a [`RetroRetriever`]; each module needs its extra."""
