"""Records: what a Service or a zone file becomes, and how a name is looked up. Pure."""
