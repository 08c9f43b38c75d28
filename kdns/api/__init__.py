"""The embedded registry: a Kubernetes API for Services, in one process and without a cluster."""
