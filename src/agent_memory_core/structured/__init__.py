"""From a schema or a tool to what may be sampled next."""
