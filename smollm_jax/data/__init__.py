"""From text files to batches: reading, preparing, mixing and shuffling. Imports no framework."""
