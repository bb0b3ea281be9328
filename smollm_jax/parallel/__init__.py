"""Training on many devices: the mesh and its shardings, and what the processes of a run have to agree on."""
