"""Forwarding: what a node does with packets to a Service, and how each dataplane spells it."""
