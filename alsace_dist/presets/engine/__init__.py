"""Ways to fit a model into memory, each to be laid over a config with --over=NAME."""
