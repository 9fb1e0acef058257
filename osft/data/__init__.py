"""Raw records -> tokens and loss masks -> micro-batches under a token budget."""
