"""Model families and their files."""
