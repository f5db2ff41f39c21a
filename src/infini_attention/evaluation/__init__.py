"""What a model or a memory is worth, measured: perplexity of a stream, bindings, and their reports."""
