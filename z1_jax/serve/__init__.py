"""Policies behind openpi's websocket protocol: a server for ours, and a client that evaluates any of them."""
