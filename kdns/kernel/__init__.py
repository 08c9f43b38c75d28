"""The node's kernel: rules, connection tracking, settings and the health that follows."""
