"""Large language models from a cave."""
