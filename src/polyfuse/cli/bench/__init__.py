"""`polyfuse bench` and `polyfuse soak`."""
