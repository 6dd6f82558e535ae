"""Datastores in other libraries: retrievers of LangChain and LlamaIndex, keys in vector databases. Each module needs its extra."""
