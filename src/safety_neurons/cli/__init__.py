"""The command line: one verb per arrow of the design. Load, call, save, print; no logic of its own."""

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with 0 (done), 1 (failed), 2 (bad usage) or 3 (gate not met)."""
    from safety_neurons.cli.verb import run

    run()
