"""The `retro` command. It is a package of its own so that `retro --help` does not wait for torch and transformers."""
