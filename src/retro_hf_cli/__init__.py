"""The `retro` command. It is a separate package, so that `retro --help` does not wait for torch and transformers."""
