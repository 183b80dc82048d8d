"""The steps of a run: one module per stage, with the same names in each."""
