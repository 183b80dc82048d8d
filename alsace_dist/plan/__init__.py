"""What a run takes, said before it is started: memory, disk, steps, and on nodes that are only wished for, time."""
