"""From outcomes to a verdict: statistics, words, plots, the report."""
