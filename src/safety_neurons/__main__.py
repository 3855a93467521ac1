"""`python -m safety_neurons` is the command `safety-neurons`."""

from safety_neurons.cli import main

if __name__ == "__main__":
    main()
