"""Where objects come from: a Kubernetes API, or manifest files. Does the I/O."""
