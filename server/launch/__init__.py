"""How a replica comes to life."""
