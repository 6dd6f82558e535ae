"""`python -m retro_hf_cli` runs the `retro` command."""

from .main import main


main()
