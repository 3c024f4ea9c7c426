"""What a conformance run looks at; each kind of check is one module."""
