"""The gateway: HTTP in, one engine chosen, bytes back; the engine processes; the command line."""
