"""How it learns: the shared plumbing and one standalone script per stage."""
