"""What is run in the checkout: the demo, the GPU check, and what writes documents. Not installed."""
