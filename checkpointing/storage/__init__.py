"""The only place that opens, writes, fsyncs, renames and unlinks."""
