"""Sockets, files and HTTP: everything that waits."""
