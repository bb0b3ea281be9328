"""Many devices and many processes: the mesh, and how processes meet and agree."""
