"""The program `osft`, and `python -m osft`."""

from osft.process import logs
from osft.process.termination import end_when_asked


def main() -> None:
    """Run a command (osft.cli)."""
    end_when_asked()
    logs.configure()
    from osft.cli import app  # only now: it takes a moment, in which process 1 of a container could not be ended

    app()


if __name__ == "__main__":
    main()
