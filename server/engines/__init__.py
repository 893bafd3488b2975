"""The engines: started, watched, chosen for a request, ended."""
