"""The commands a user types. None imports a framework before its flags are read."""
