"""The nouns: frozen, typed values. Nothing here needs a kernel, a clock or a file."""
