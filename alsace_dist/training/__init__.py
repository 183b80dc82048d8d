"""The one training loop and its engine."""
