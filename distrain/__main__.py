"""`python -m distrain` is `distrain`."""

from distrain.cli.main import main

if __name__ == "__main__":
    main()
