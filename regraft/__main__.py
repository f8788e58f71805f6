"""``python -m regraft``: the command line."""

from regraft.cli.main import run

if __name__ == "__main__":
    run()
