"""The wire: names, messages, EDNS. Pure."""
