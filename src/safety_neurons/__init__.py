"""Find the neurons which make a language model safe, prove it causally, and use them."""
