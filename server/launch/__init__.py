"""How a replica comes to life. Today: a local process."""
