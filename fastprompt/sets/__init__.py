"""Many prompt sets on one backbone: which one is in use, mixed batches, files, sets from others."""
