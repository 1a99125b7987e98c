"""Models: what their components take and give, and how they are loaded."""
