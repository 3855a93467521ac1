"""What a treatment costs: perplexity of general text, divergence on benign prompts."""

from safety_neurons.capability.language import divergence, perplexity

__all__ = ["divergence", "perplexity"]
