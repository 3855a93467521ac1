"""The command line: one verb per arrow of the design. Load, call, save, print; no logic of its own."""

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with 0 (done), 1 (failed), 2 (bad usage) or 3 (gate not met)."""
    import json
    import sys

    try:
        from safety_neurons.cli.verb import run
    except KeyboardInterrupt:  # Nothing that could say it is there yet.
        line = "interrupted: nothing was written"
        if "--json" in sys.argv:
            sys.stdout.write(f"{json.dumps({'error': line, 'exit_code': 130})}\n")
        else:
            sys.stderr.write(f"safety-neurons: {line}\n")
        raise SystemExit(130) from None
    run()
