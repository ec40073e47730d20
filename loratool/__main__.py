"""`python -m loratool`: the same as the `loratool` command."""

from loratool.cli import main

if __name__ == "__main__":
    main()
