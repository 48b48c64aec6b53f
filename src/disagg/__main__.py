"""`python -m disagg` is the command line."""

from disagg.cli.main import main

if __name__ == "__main__":
    main()
