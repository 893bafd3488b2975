"""The OpenAPI document: what is served, told to people and to generators of clients."""
