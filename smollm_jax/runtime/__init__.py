"""The process and its machine: `signals` (what SIGTERM does), strict readers, atomic writes, locks, streams, malloc,
compilation cache."""
