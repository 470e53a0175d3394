"""`python -m distrain.cli` is `distrain`, as `python -m distrain` is."""

from distrain.cli.main import main

if __name__ == "__main__":
    main()
