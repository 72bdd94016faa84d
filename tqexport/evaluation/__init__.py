"""Numbers on data that outgrow a machine: shards of samples, workers that take them, counts that add up."""
