"""`python -m loratune`, equivalent to the console script."""

from loratune.cli.app import main

if __name__ == "__main__":
    main()
