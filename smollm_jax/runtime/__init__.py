"""The process and its machine: strict readers, atomic writes, locks, signals, streams, malloc, compilation cache."""
