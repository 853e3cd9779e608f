"""`python -m loratune`: the same as the console script."""

from loratune.cli.app import main

if __name__ == "__main__":
    main()
