"""The method's arithmetic, in numpy alone."""
