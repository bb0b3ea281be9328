"""What a process owes the machine: strict files, atomic writes, locks, signals, streams, memory, compile cache."""
