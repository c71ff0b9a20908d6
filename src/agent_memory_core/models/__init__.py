"""From a model id to a checked, loaded model."""
