"""quest-deploy."""
