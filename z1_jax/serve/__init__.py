"""Policies behind openpi's websocket protocol: the server, and the other end of it for evaluations."""
