"""The command line: one verb per arrow of the design. Load, call, save, print; no logic of its own."""

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with 0 (done), 1 (failed), 2 (bad usage) or 3 (gate not met)."""
    try:
        from safety_neurons.cli.verb import run
    except KeyboardInterrupt:  # What says so otherwise is not there yet.
        import sys

        from safety_neurons.cli import console

        line, code = "interrupted: nothing was written", 130
        if "--json" in sys.argv:
            console.streams().out.write(console.json_line({"error": line, "exit_code": code}))
        else:
            console.tell(f"safety-neurons: {line}\n")
        raise SystemExit(code) from None
    run()
