"""One file at a time, in and out: headers, byte ranges, tensor writers, stages, checkpoint folders, the cache of the Hub."""
