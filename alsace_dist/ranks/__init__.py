"""A group of ranks: how it starts, how it ends, and how a hang is noticed."""
