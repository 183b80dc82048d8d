"""Tasks: what a parallel group is as prompt and candidates, and where published datasets come from."""
