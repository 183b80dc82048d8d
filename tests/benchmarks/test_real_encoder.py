"""The real encoder, converted here, against the package's own reader."""
