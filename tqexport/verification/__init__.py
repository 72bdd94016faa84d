"""Does what runs on the device equal what was trained? Runtimes, comparison, bounds on rounding, report."""
