"""Model libraries that can be told to run polyfuse's ops: one module each, imported only by name."""
