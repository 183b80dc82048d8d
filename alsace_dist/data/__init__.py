"""From source data and shards to rows and batches."""
