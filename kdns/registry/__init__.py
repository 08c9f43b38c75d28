"""The registry: Kubernetes objects decoded, kept and published as snapshots. Pure."""
